"""Sizes of pico models that the rules of `compress.models.shrink` do not find, by model type."""

from __future__ import annotations

from typing import Any

#: Fields with a width per stage.
STAGED = r"hidden_sizes|embed_dims?|stage_(in|mid|out)_channels|encoder_hidden_sizes"
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
#: Fields that have no value in a default config, and without which the class cannot be built, by `model_type`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "granitemoehybrid": {"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "xmod": {"default_language": "en_XX"},
}
#: Fields by `model_type` of the section; a dot leads into a nested section.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "blt": {"use_cache": False},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "dory": {
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
    },
    "hrm_text": {"num_layers_per_stack": 2, "H_cycles": 1, "L_cycles": 1, "L_bp_cycles": [1], "num_hidden_layers": 4},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
}
#: Rows of token ids that make one sample, by `model_type`: a row per codebook.
ROWS = {"musicgen_decoder": 4, "musicgen_melody_decoder": 4}
