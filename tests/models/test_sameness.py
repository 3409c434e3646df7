"""The check after a stage: what is written computes what was handed over, at once and token by token."""

from __future__ import annotations

import pytest
import torch
import transformers

import compress
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Derived, Value
from compress.errors import CheckpointError
from compress.models import sameness
from compress.models.sameness import same_logits
from tests import pico
from tests.toolbox import edit_config

CAUSAL = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt2", "bloom", "gpt_neox", "opt"]  # fmt: skip


@pytest.mark.parametrize("window", [6, 4096])
def test_same_logits_finds_unused_sliding_window(window, tmp_path):
    """Right at once, wrong through the cache, which forgets."""
    folder = pico.save(tmp_path / "in")
    types = ["full_attention", "sliding_attention"] * 2
    edit_config(folder, layer_types=types, sliding_window=window)
    with pytest.raises(CheckpointError, match=r"token by token, through its cache, than at once: .*`sliding_window`") as caught:  # fmt: skip
        compress.apply("cast", folder, tmp_path / "out", weights="bf16")
    assert "\n" not in str(caught.value)
    recipe = {"model": str(folder), "output": str(tmp_path / "run"), "passes": [{"cast": {"weights": "bf16"}}]}
    with pytest.raises(CheckpointError, match="through its cache"):
        compress.run(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "family",
    pico.families([*CAUSAL, "bert", "t5", "vit", "electra"], tier=("llama", "gemma3_text", "gpt_neox", "t5", "vit")),
)
def test_same_logits_passes_unchanged_models(family, tmp_path):
    changes = {"sliding_window": 4096} if family in ("mistral", "qwen2", "gemma2", "gemma3_text") else {}
    stored = open_checkpoint(pico.save(tmp_path / "in", family, **changes))
    same_logits(stored, stored)


def test_same_logits_asks_no_cache_of_masked_decoder(tmp_path):
    stored = open_checkpoint(pico.save(tmp_path / "in", "bert", class_name="BertLMHeadModel"))
    same_logits(stored, stored)


@pytest.mark.parametrize(
    ("family", "changed"), [("llama", "lm_head.weight"), ("t5", "decoder.block.1.layer.1.EncDecAttention.v.weight")]
)
def test_same_logits_finds_other_values(family, changed, tmp_path):
    stored = open_checkpoint(pico.save(tmp_path / "in", family))

    def read(name):
        value = stored.tensor(name)
        return Value(value.data + 0.1) if name == changed else value

    with pytest.raises(CheckpointError, match=r"the written model computes other values \(difference"):
        same_logits(Derived(stored, stored.spec, read), stored)


def test_same_logits_compares_families_without_a_record(tmp_path, monkeypatch):
    """Through the cache too; nothing says that a family unknown here computes the same with and without one."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.Olmo2ForCausalLM(
        transformers.Olmo2Config(vocab_size=300, pad_token_id=0, eos_token_id=0, **sizes)
    )
    model.save_pretrained(tmp_path / "in")
    stored = open_checkpoint(tmp_path / "in")
    seen = []
    real = sameness._step_by_step
    monkeypatch.setattr(sameness, "_step_by_step", lambda model, ids: seen.append(real(model, ids)) or seen[-1])
    same_logits(stored, stored)
    assert len(seen) == 2
    assert torch.equal(*seen)
    monkeypatch.setattr(
        sameness, "_step_by_step", lambda model, ids: seen.append(real(model, ids) + len(seen)) or seen[-1]
    )
    with pytest.raises(CheckpointError, match="the written model computes other values through its cache"):
        same_logits(stored, stored)


def test_a_model_that_runs_no_more_is_refused(tmp_path):
    """Bamba's class cannot make a cache without a block of attention."""
    checkpoints = []
    for attention in ([1], []):
        config = transformers.BambaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            attn_layer_indices=attention, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8,
        )  # fmt: skip
        folder = tmp_path / str(len(attention))
        transformers.BambaForCausalLM(config).save_pretrained(folder)
        checkpoints.append(open_checkpoint(folder))
    whole, broken = checkpoints
    same_logits(whole, whole, whole)
    with pytest.raises(CheckpointError, match="runs before the pass and fails after it"):
        same_logits(broken, broken, whole)
