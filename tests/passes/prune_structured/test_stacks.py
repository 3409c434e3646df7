"""Encoder-decoders: units go from both lists of blocks; what a sweep would have to follow is refused."""

from __future__ import annotations

import pytest
import torch

from compress.checkpoint.layout import lay_out
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Derived, Value
from compress.errors import CheckpointError, CompressError, PassError
from compress.evaluation import latency
from compress.models.loading import load_model
from tests import pico
from tests.passes.prune_structured.test_remove import DATA_FREE, HEADS_OUT, MLP_OUT, check
from tests.toolbox import apply, edit_config, plan, write


@pytest.mark.parametrize(
    ("class_name", "kind"),
    [
        *((None, "relu"), ("T5EncoderModel", "gated-gelu"), ("T5ForSequenceClassification", "relu")),
        pytest.param("T5Model", "relu", marks=pytest.mark.slow),
        pytest.param("T5EncoderModel", "relu", marks=pytest.mark.slow),
        *(
            pytest.param(name, "gated-gelu", marks=pytest.mark.slow)
            for name in (None, "T5Model", "T5ForSequenceClassification")
        ),
    ],
)
@pytest.mark.parametrize(("settings", "ends"), [({"mlp": "25%"}, MLP_OUT), ({"heads": 1}, HEADS_OUT)])
def test_stacks_of_every_class_match_zeroed_twin(class_name, kind, settings, ends, tmp_path, monkeypatch):
    """Gated and ungated, with and without a decoder, of another depth than the encoder: equal to the original with zeros."""
    if class_name == "T5ForSequenceClassification":  # one text, with an end that marks where it is read off
        ids = torch.tensor([[5, 9, 200, 31, 4, 0]])
        monkeypatch.setattr(pico, "inputs", lambda loaded, length=0: {"input_ids": ids})
    original = open_checkpoint(
        pico.save(tmp_path / "in", "t5", with_tokenizer=False, class_name=class_name, feed_forward_proj=kind)
    )
    pruned = check(original, ends, tmp_path, **settings)
    config = pruned.spec.structure.config
    assert (config["d_ff"], config["num_heads"]) == ((48, 4) if "mlp" in settings else (64, 3))
    planned = plan(original, "prune_structured", **DATA_FREE, **settings)
    assert planned.tensors == pruned.spec.tensors
    assert lay_out(planned, 1 << 62, original.metadata).bytes == (pruned.folder / "model.safetensors").stat().st_size


def test_stacks_lose_the_same_heads_in_every_block(tmp_path):
    """What distances add to scores lies in the first block; columns of its table go as the heads do."""
    original = open_checkpoint(pico.save(tmp_path / "in", "t5", with_tokenizer=False))
    pruned = write(apply(original, "prune_structured", heads=2, **DATA_FREE), tmp_path / "out")
    kept = {}
    for side, depth in (("encoder", 4), ("decoder", 3)):
        name = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        before, after = original.tensor(name).data, pruned.tensor(name).data
        kept[side] = [(column == before.T).all(1).nonzero().item() for column in after.T]
        for index in range(depth):
            name = f"{side}.block.{index}.layer.0.SelfAttention.q.weight"
            heads = original.tensor(name).data.view(4, 8, 32)[kept[side]]
            assert torch.equal(pruned.tensor(name).data, heads.reshape(16, 32))


def test_stacks_lose_heads_of_least_magnitude(tmp_path):
    """One head is made small in all blocks of the encoder: that one goes."""
    base = open_checkpoint(pico.save(tmp_path / "in", "t5", with_tokenizer=False))

    def small(name: str) -> Value:
        data = base.tensor(name).data.clone()
        if name.startswith("encoder") and name.endswith("SelfAttention.v.weight"):
            data[8:16] *= 1e-3
        if name.startswith("encoder") and name.endswith("SelfAttention.o.weight"):
            data[:, 8:16] *= 1e-3
        return Value(data)

    quiet = write(Derived(base, base.spec, small), tmp_path / "quiet")
    pruned = write(apply(quiet, "prune_structured", heads=1, **DATA_FREE), tmp_path / "out")
    name = "encoder.block.2.layer.0.SelfAttention.q.weight"
    assert torch.equal(pruned.tensor(name).data, quiet.tensor(name).data.view(4, 8, 32)[[0, 2, 3]].reshape(24, 32))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "prune_structured",
            {"mlp": "25%"},
            "are in several lists, .*; set `importance: magnitude` and `compensation: none`",
        ),
        (
            "prune_structured",
            {"keep_parameters": 0.5},
            "are in several lists, .*; set `importance: magnitude`",
        ),
        ("prune_structured", {"layers": [1]}, "none can be removed by its number; remove `mlp` or `heads` instead"),
        ("prune_structured", {"layers": 1}, "none can be removed by its number; remove `mlp` or `heads` instead"),
        (
            "prune_structured",
            {"hidden": 8, **DATA_FREE},
            "cannot lose hidden width exactly: the encoder and the decoder",
        ),
    ],
)
def test_stacks_refuse_unfit_settings(name, settings, message, tmp_path):
    original = open_checkpoint(pico.save(tmp_path / "in", "t5", with_tokenizer=False))
    with pytest.raises(PassError, match=message):
        plan(original, name, **settings)


@pytest.mark.slow  # what the worker says; `check` says it first, in tests/pipeline/test_preflight.py
def test_stacks_latency_refuses_two_texts(tmp_path):
    folder = pico.save(tmp_path / "in", "t5", with_tokenizer=False)
    with pytest.raises(
        CompressError, match="latency is measured on one text, and T5ForConditionalGeneration reads two"
    ):
        latency.measure_latency([folder, folder], dtype="float32", device="cpu", threads=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_decoder_layers": 5}, r"decoder\.block\.3: the weights hold none"),
        ({"num_layers": 3}, "block 3: the config says 3"),
    ],
)
def test_stacks_depth_of_both_lists_is_checked(change, message, tmp_path):
    folder = pico.save(tmp_path / "in", "t5", with_tokenizer=False)
    edit_config(folder, **change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_stacks_load_again_the_same(tmp_path):
    folder = pico.save(tmp_path / "in", "t5", with_tokenizer=False)
    torch.testing.assert_close(pico.logits(load_model(folder)), pico.logits(pico.model("t5")))
