"""Pico models from configs of any family."""

from __future__ import annotations

import pytest
import torch
import transformers

from compress.models.block_kinds import kept_blocks
from compress.models.pico import dummy_inputs, pico_model
from compress.models.shrink import default_config, shrunken, shrunken_fields


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("olmo2", "Olmo2ForCausalLM"),
        ("jamba", "JambaForCausalLM"),
        ("deepseek_v3", "DeepseekV3ForCausalLM"),
        ("bart", "BartForConditionalGeneration"),
        pytest.param("gemma3", "Gemma3ForConditionalGeneration", marks=pytest.mark.slow),
        ("whisper", "WhisperForConditionalGeneration"),
        pytest.param("vit", "ViTForImageClassification", marks=pytest.mark.slow),
        pytest.param("pix2struct", "Pix2StructForConditionalGeneration", marks=pytest.mark.slow),
        pytest.param("audio-spectrogram-transformer", "ASTForAudioClassification", marks=pytest.mark.slow),
        ("blip-2", "Blip2ForConditionalGeneration"),
        pytest.param("kosmos-2", "Kosmos2ForConditionalGeneration", marks=pytest.mark.slow),
        pytest.param("wav2vec2-bert", "Wav2Vec2BertForCTC", marks=pytest.mark.slow),
        ("molmo2", "Molmo2ForConditionalGeneration"),
        pytest.param("pi0", "PI0ForConditionalGeneration", marks=pytest.mark.slow),
        pytest.param("gemma4_assistant", "Gemma4AssistantForCausalLM", marks=pytest.mark.slow),
        ("swiftformer", "SwiftFormerForImageClassification"),
    ],
)
def test_a_shrunken_default_config_builds_and_runs(kind: str, name: str) -> None:
    model = pico_model(getattr(transformers, name), shrunken(default_config(kind)))
    assert sum(p.numel() for p in model.parameters()) < 2e6
    with torch.inference_mode():
        assert model(**dummy_inputs(model)).logits.isfinite().all()


def test_equal_rotary_sections_stay_equal() -> None:
    for widths, small in (([22, 22, 20], [2, 2, 4]), ([16, 24, 24], [2, 3, 3]), ([16] * 4, [2] * 4)):
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": widths}
        data = {"hidden_size": 1024, "num_attention_heads": 8, "head_dim": 128, "rope_parameters": rope}
        assert shrunken_fields(data)["rope_parameters"]["mrope_section"] == small


def test_kinds_of_blocks_are_kept() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = transformers.Gemma3TextConfig(num_hidden_layers=12, layer_types=kinds * 2, hidden_size=256)
    assert kept_blocks(config.to_dict()) == [0, 1, 5, 11]
    assert shrunken(config).layer_types == ["sliding_attention"] * 2 + ["full_attention"] * 2


def test_numbers_of_blocks_follow() -> None:
    config = transformers.Qwen3MoeConfig(num_hidden_layers=12, mlp_only_layers=[3, 7])
    small = shrunken(config)
    assert small.num_hidden_layers == 4
    assert small.mlp_only_layers == [2, 3]


def test_sizes_of_a_users_config_keep_their_kind() -> None:
    config = transformers.LlamaConfig(
        hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, eos_token_id=128009, attention_bias=True
    )
    small = shrunken(config)
    assert (small.hidden_size, small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (64, 4, 2, 16)
    assert small.attention_bias
    assert small.eos_token_id == 319
    assert small.dtype in (None, torch.float32)
    assert shrunken(transformers.LlamaConfig(num_attention_heads=32, num_key_value_heads=1)).num_key_value_heads == 1


def test_no_weight_of_a_pico_model_is_degenerate() -> None:
    model = pico_model(transformers.PhiForCausalLM, shrunken(transformers.PhiConfig()))
    assert all(p.std() > 0.03 for p in model.parameters())
    again = pico_model(transformers.PhiForCausalLM, shrunken(transformers.PhiConfig()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
