"""Models that lay samples out otherwise, or leave blocks out: what blocks read is what they read in the whole model."""

from __future__ import annotations

import pytest
import torch
import transformers

import compress
from compress.architectures.codebooks import rows_per_sample
from compress.blockwise.inputs import Inputs
from compress.checkpoint.open import open_checkpoint
from compress.errors import PassError
from compress.models.loading import load_checkpoint
from compress.models.pico import pico_model
from compress.models.shrink import default_config, shrunken
from tests.toolbox import matrices, runner_of

SAMPLES, LENGTH = 5, 12
MASK = torch.arange(LENGTH) < torch.tensor([LENGTH, 4, 7, 5, 9])[:, None]
#: Model type ▶ class, rows of token ids that make one sample, axis of the samples in what blocks read, and whether it is padded.
CASES = {
    "xlnet": ("XLNetLMHeadModel", 1, 1, True),
    "mllama_text_model": ("MllamaForCausalLM", 1, 0, True),
    "musicgen_decoder": ("MusicgenForCausalLM", 4, 0, False),
}


def checkpoint_of(kind, folder):
    cls = getattr(transformers, CASES[kind][0])
    pico_model(cls, shrunken(default_config(kind))).save_pretrained(folder)
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    "kind", [kind if kind == "xlnet" else pytest.param(kind, marks=pytest.mark.slow) for kind in CASES]
)
def test_blocks_read_what_they_read_in_the_whole_model(kind, tmp_path):
    _, rows, axis, padded = CASES[kind]
    checkpoint = checkpoint_of(kind, tmp_path / "in")
    ids = torch.randint(2, 250, (SAMPLES * rows, LENGTH), generator=torch.Generator().manual_seed(0))
    inputs = Inputs({"input_ids": ids}, MASK if padded else None, per_sample=rows_per_sample(checkpoint.spec, len(ids)))
    assert inputs.samples == SAMPLES
    runner = runner_of(checkpoint, tmp_path / "work", inputs, with_targets=True)
    model, reads = load_checkpoint(checkpoint, dtype="float32"), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, a, name=name: reads.__setitem__(f"{name}.weight", a[0]))
    with torch.no_grad():
        model(**inputs.rows(range(SAMPLES)))
    seen, left_out = {}, []

    def look(block):
        seen.update({linear.name: sums for group, sums, _ in block.statistics(1) for linear in group})
        with torch.no_grad():
            output = block.forward([0, 3], block.inputs.read([0, 3]))
        assert torch.allclose(output, block.targets.read([0, 3]), rtol=1e-5, atol=1e-5)
        left_out.extend([] if block.runs else [block.index])
        return {}

    runner.run(look, "looking")
    assert seen.keys() == matrices(checkpoint)
    # cross-attention to images, where there are none
    assert left_out == (checkpoint.spec.structure.config["cross_attention_layers"] if kind.startswith("mllama") else [])
    unread = [name for name in seen if any(f"layers.{i}." in name for i in left_out) or "encoder_attn" in name]
    assert sorted(unread) == sorted(seen.keys() - reads.keys())
    assert all(seen[name].tokens == 0 for name in unread)
    for name in seen.keys() & reads.keys():
        sums, x = seen[name], reads[name].transpose(0, axis)
        x = (x[MASK] if padded else x.flatten(0, 1)).double()
        assert sums.tokens == len(x), name
        assert torch.allclose(sums.hessian.double(), x.T @ x, rtol=1e-4, atol=1e-4 * float((x.T @ x).abs().max())), name


def test_rows_that_make_no_whole_sample_are_refused(tmp_path):
    spec = checkpoint_of("musicgen_decoder", tmp_path).spec
    with pytest.raises(PassError, match=r"6 rows of token ids make no whole number of samples.*give a multiple of 4"):
        rows_per_sample(spec, 6)


@pytest.mark.slow
def test_a_block_that_is_left_out_is_not_taken_for_the_least_important(tmp_path):
    """No text changes without a layer of cross-attention to images, and it is not removed unless it is named."""
    checkpoint = checkpoint_of("mllama_text_model", tmp_path / "in")
    number = checkpoint.spec.structure.config["cross_attention_layers"][0]
    data = torch.randint(2, 250, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    with pytest.raises(PassError, match=f"block {number} would go first, as it is not run .*name the blocks to remove"):
        compress.apply("prune_structured", tmp_path / "in", tmp_path / "out", data=data, layers=1)


@pytest.mark.slow
def test_a_model_inside_without_sdpa_has_eager_attention(tmp_path):
    """The text blocks of a model whose tower of sounds has no fused attention run block by block."""
    config = shrunken(default_config("vibevoice_asr"))
    pico_model(transformers.VibeVoiceAsrForConditionalGeneration, config).save_pretrained(tmp_path / "model")
    settings = {"weights": "int8", "method": "gptq", "only": [r"re:.*layers\.0\.mlp\..*"]}
    folder = compress.apply(
        "cast", tmp_path / "model", tmp_path / "out", data=torch.arange(32).reshape(2, 16), **settings
    )
    cast = {t.module for t in open_checkpoint(folder).spec.stored() if t.quant_format}
    assert any(name.endswith("layers.0.mlp.down_proj") for name in cast)
