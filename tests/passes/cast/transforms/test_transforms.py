"""Transformed models compute what they did: exactly for each family, and after stock loading."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress import passes
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Derived
from compress.data.batches import Batches
from compress.errors import PassError
from compress.models.loading import load_model
from compress.passes.cast.settings import CastSettings
from compress.passes.cast.transforms.plan import notes, smoothed_channels, transformed_spec
from compress.passes.cast.transforms.rotate import rotated
from compress.passes.cast.transforms.smooth import smooth
from compress.passes.work import DataSizes, SampleSize
from compress.planning import planned_size, size_on_disk
from tests import pico
from tests.toolbox import IDS, apply, edit_config, our_logits, plan, prune, stock_logits, write

#: Families whose hidden states between blocks can be rotated.
ROTATED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe", "qwen2_moe", "granite_swa", "smollm3")
#: Families whose inputs can be smoothed.
SMOOTHED = (*ROTATED, "gemma2", "gemma3_text", "gpt2", "bloom", "gpt_neox", "opt")
BOTH = ["residual", "values"]


def random_scales(channels):
    """Channels with scales from 0.3 to 3."""
    generator = torch.Generator().manual_seed(0)
    return [(one, torch.randn(one.count, generator=generator).double().clamp(-1, 1).exp()) for one in channels]


def transformed(checkpoint, rotations):
    """The checkpoint with rotations, then with random scales wherever they can be smoothed."""
    settings = CastSettings(weights="int8", rotations=rotations, smoothing=0.5)
    spec = transformed_spec(checkpoint.spec, settings)
    return smooth(rotated(checkpoint, spec, settings, 0), random_scales(smoothed_channels(spec, settings)))


def logits(folder):
    """Logits after `IDS` in float64 throughout, where the classes of transformers compute norms in float32."""
    model = load_model(folder, dtype="float64")
    model.set_experts_implementation("eager")  # the other has no float64
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return model(input_ids=IDS)[0]


@pytest.mark.parametrize("family", pico.families(SMOOTHED, tier=("llama", "gpt2")))
def test_transformed_models_compute_the_same(family, tmp_path):
    folder = pico.folder(family, dtype=torch.float64, with_tokenizer=False)
    checkpoint = open_checkpoint(folder)
    after = transformed(checkpoint, BOTH if family in ROTATED else ["values"])
    changed = [n for n in checkpoint.spec.tensors if not torch.equal(after.tensor(n).data, checkpoint.tensor(n).data)]
    assert len(changed) >= len(checkpoint.spec.tensors) // 2
    written = write(after, tmp_path / "out")
    assert (logits(written.folder) - logits(folder)).abs().max() < 1e-10


@pytest.mark.parametrize("family", pico.families(("bert", "olmo3", "electra"), tier=()))
def test_rotated_values_of_other_families_compute_the_same(family, tmp_path):
    folder = pico.folder(family, dtype=torch.float64, with_tokenizer=False)
    checkpoint, settings = open_checkpoint(folder), CastSettings(weights="int8", rotations=["values"])
    written = write(rotated(checkpoint, checkpoint.spec, settings, 0), tmp_path / "out")
    assert (logits(written.folder) - logits(folder)).abs().max() < 1e-10


def test_norms_in_bfloat16_are_divided_by_what_they_can_hold():
    """The rounding error of a norm's weight goes into the columns that read it."""
    checkpoint = open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, with_tokenizer=False))
    settings = CastSettings(weights="int8", smoothing=0.5)
    channels = smoothed_channels(checkpoint.spec, settings)
    after = smooth(checkpoint, random_scales(channels))
    norm = next(one for one in channels if one.kind == "mlp norm")
    name, reader = f"{norm.source.module}.weight", f"{norm.readers[0].module}.weight"
    stored = after.tensor(name).data.bfloat16().float()
    assert not torch.equal(stored.bfloat16(), checkpoint.tensor(name).data)
    before = checkpoint.tensor(reader).data.float() * checkpoint.tensor(name).data.float()
    assert torch.allclose(after.tensor(reader).data * stored, before, rtol=1e-6, atol=0)


def test_tied_models_get_a_head_of_their_own(tmp_path):
    folder = pico.folder("llama", tie_word_embeddings=True, with_tokenizer=False)
    before = open_checkpoint(folder)
    settings = {"weights": "fp32", "rotations": BOTH}
    planned = plan(before, "cast", **settings)
    assert planned.exact
    assert planned.structure.config["tie_word_embeddings"] is False
    details = {}
    written = write(apply(before, "cast", details=details, **settings), tmp_path / "out")
    assert size_on_disk(written).bytes == planned_size(planned, "stock", 1 << 40).bytes
    assert torch.allclose(our_logits(written.folder), our_logits(folder), atol=5e-5)
    assert details["transforms"].startswith("rotations of residual and values")
    (note,) = notes(before.spec, CastSettings(**settings))
    assert "38.4 kB more" in note
    assert notes(before.spec, CastSettings(weights="int8", rotations=["values"])) == []
    assert plan(before, "cast", weights="int8", rotations=["values"]).tensors["lm_head.weight"].alias_of is not None


def test_smoothing_measures_inputs_once_and_keeps_its_scales(tmp_path):
    """What is kept in the workspace stands for a second measurement, and int8 inputs lose less with it."""
    folder = pico.folder("llama", with_tokenizer=False)
    before, data = open_checkpoint(folder), Batches(torch.randint(5, 250, (4, 16)))
    settings = {"scheme": "W8A8", "method": "rtn", "smoothing": 0.5}
    details = {}
    first = apply(before, "cast", data=data, work=tmp_path / "work", details=details, **settings)
    again = apply(before, "cast", work=tmp_path / "work", **settings)
    plain = apply(before, "cast", scheme="W8A8", method="rtn")
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(first.tensor(name).codes.codes, again.tensor(name).codes.codes)
    assert not torch.equal(first.tensor(name).codes.codes, plain.tensor(name).codes.codes)
    assert details["transforms"] == "smoothing 0.5, folded into the weights before they were rounded"
    instance = passes.get("cast")
    assert instance.required_data(instance.settings(**settings)) == {"calibration"}
    assert instance.mode_for(instance.settings(scheme="W8A8", method="rtn", rotations=BOTH)) == "stream"


def test_plans_count_the_work_of_transforms():
    instance, sizes = passes.get("cast"), DataSizes(SampleSize(4, 16))
    spec = open_checkpoint(pico.folder("llama", with_tokenizer=False)).spec

    def products(**settings):
        work = instance.work(spec, instance.settings(scheme="W8A8", method="rtn", **settings), sizes)
        return sum(amount.times for amount in work.amounts() if amount.kind == "product")

    assert products() == products(rotations=BOTH) == 0
    assert products(smoothing=0.5) == 4 * 7 * 4 * 16  # blocks, matrices, tokens
    settings = instance.settings(scheme="W8A8", method="rtn", smoothing=0.5)
    assert instance.work(spec, settings, DataSizes()) is None


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gemma2", {"rotations": ["residual"]}, r"gemma2 normalises what blocks add .*; use `rotations: \[values\]`"),
        ("gpt2", {"rotations": ["residual"]}, r"the norms of gpt2 subtract the mean, .*; use `rotations: \[values\]`"),
        ("bert", {"smoothing": 0.5}, r"the norms of bert are not read by .* alone; leave `smoothing` out"),
        ("t5", {"rotations": ["values"]}, r"no record says .* of t5; leave `rotations` out"),
        ("minicpm3", {"rotations": ["residual"]}, r"the norms of minicpm3 .*; leave `rotations` out"),
    ],
)
def test_families_are_refused_by_the_reason_and_the_cure(family, settings, message):
    checkpoint = open_checkpoint(pico.folder(family, with_tokenizer=False))
    with pytest.raises(PassError) as caught:
        plan(checkpoint, "cast", weights="int8", **settings)
    assert caught.match(message)
    assert caught.value.key == next(iter(settings))


def test_weights_that_cannot_be_transformed_are_refused(tmp_path):
    checkpoint = open_checkpoint(pico.folder("llama", with_tokenizer=False))
    with pytest.raises(PassError, match=r"has weights removed, which a rotation would fill in; leave `rotations` out"):
        plan(prune(checkpoint, sparsity=0.5), "cast", weights="int8", rotations=["residual"])
    assert plan(prune(checkpoint, sparsity=0.5), "cast", weights="int8", smoothing=0.5).exact
    coded = apply(checkpoint, "cast", weights="int8", method="rtn", only=["re:.*mlp.*"])
    with pytest.raises(PassError, match=r"mlp.* has codes already; leave `rotations` out"):
        plan(coded, "cast", weights="int8", rotations=["residual"])
    extra = replace(checkpoint.spec.tensors["lm_head.weight"], name="model.layers.1.mlp.adapter.weight")
    spec = replace(checkpoint.spec, tensors={**checkpoint.spec.tensors, extra.name: extra})
    with pytest.raises(PassError, match=r"no record says what model.layers.1.mlp.adapter.weight reads and writes"):
        plan(Derived(checkpoint, spec, checkpoint.tensor), "cast", weights="int8", smoothing=0.5)
    folder = pico.save(tmp_path / "opt", "opt", with_tokenizer=False)
    edit_config(folder, do_layer_norm_before=False)
    with pytest.raises(PassError, match=r"the norms of opt are not read by"):
        plan(open_checkpoint(folder), "cast", weights="int8", smoothing=0.5)


def test_settings_of_transforms():
    with pytest.raises(ValueError, match=r"`smoothing` needs codes, such as `scheme: W8A8`"):
        CastSettings(weights="bf16", smoothing=0.5)
    with pytest.raises(ValueError, match="named twice"):
        CastSettings(weights="int8", rotations=["values", "values"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "qwen3_moe"])
def test_stock_transformers_opens_rotated_and_smoothed_codes(family, tmp_path):
    folder = pico.folder(family, dtype=torch.float32)
    data = Batches(torch.randint(5, 250, (4, 16)))
    settings = {"scheme": "W8A8", "rotations": BOTH, "smoothing": 0.5, "effort": "fast"}
    written = write(
        apply(open_checkpoint(folder), "cast", data=data, work=tmp_path / "work", **settings), tmp_path / "out"
    )
    theirs = stock_logits(written.folder, tmp_path)
    ours = our_logits(written.folder)
    assert (theirs - ours).abs().max() < 1e-3 * ours.abs().max()
    assert (ours - our_logits(folder)).abs().mean() < 0.1 * ours.std()
