"""Sizes of pico models that the rules of `compress.models.shrink` do not find, by model type."""

from __future__ import annotations

from typing import Any

#: Fields with a width per stage.
STAGED = (
    "depths",
    "hidden_sizes",
    "embed_dim",
    "embed_dims",
    "stage_out_channels",
    "neck_hidden_sizes",
    "base_attn_unit_dims",
    "out_channels",
    "block_configs",
    "conv_layer_kernel_sizes",
)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
#: Fields that have no value in a default config, and without which the class cannot be built, by `model_type`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "chameleon": {"vocabulary_map": {"<image>": 5, "IMGIMGBS0Z": 6}},
    "deepseek_ocr2_text": {
        "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_experts_per_tok": 2,
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6, "<|visual token 000000|>": 7}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"mrope_section": [22, 22, 20]}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "fast_vlm": {"vision_config": {"architecture": "fastvit_mci3", "model_args": {"inference_mode": True}}},
    "glm4v_moe_text": {"rope_parameters": {"mrope_section": [8, 12, 12]}},
    "glm4v_text": {"rope_parameters": {"mrope_section": [8, 12, 12]}},
    "glm_ocr_text": {"rope_parameters": {"mrope_section": [8, 12, 12]}},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0], [-1, 1]], "downsample_rate": "1/2"},
    "hunyuan_vl_text": {"rope_parameters": {"mrope_section": [16, 16, 16, 16]}},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "paddleocr_vl_text": {"rope_parameters": {"mrope_section": [16, 24, 24]}},
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {"embed_dim": 1024, "depth": 23, "img_size": [448, 448], "global_pool": ""},
        }
    },
    "qwen2_5_omni_text": {"rope_parameters": {"mrope_section": [16, 24, 24]}},
    "qwen2_5_vl_text": {"rope_parameters": {"mrope_section": [16, 24, 24]}},
    "qwen2_vl_text": {"rope_parameters": {"mrope_section": [16, 24, 24]}},
    "step3p5": {"sliding_window": 512},
    "granitemoehybrid": {"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "qwen4_exp_text": _INDEXER,
    "t5": {"decoder_start_token_id": 0},
    "timm_wrapper": {
        "architecture": "vit_small_patch16_224",
        "model_args": {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    },
    "wav2vec2-bert": {"vocab_size": 320},
    "wav2vec2-conformer": {"vocab_size": 320},
    "xmod": {"default_language": "en_XX"},
    "blip-2": {"image_token_index": 7},
    "instructblip": {"image_token_index": 7},
    "instructblipvideo": {"video_token_index": 7},
}
#: Fields by `model_type` of the section; a dot leads into a nested section.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "image_token_offset": 264,
        "audio_token_offset": 296,
        "vision_config.codebook_size": 32,
        "audio_config.codebook_size": 16,
    },
    "blt": {"use_cache": False},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "dory": {
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
    },
    "donut-swin": {"image_size": 224},
    "efficientnet": {"hidden_dim": 1280, "width_coefficient": 1.0, "depth_coefficient": 1.0},
    "fast_vlm": {
        "vision_config.model_args": {
            "inference_mode": True,
            "layers": [1, 1, 1, 1, 1],
            "embed_dims": [16, 32, 32, 32, 32],
            "mlp_ratios": [2, 2, 2, 2, 2],
        }
    },
    "florence_vision": {"embed_dim": [32, 64, 128, 256], "num_heads": [1, 2, 4, 8], "num_groups": [1, 2, 4, 8]},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gemma3n_vision": {"hidden_size": 2048, "model_args": {"channel_multiplier": 0.1}},
    "hrm_text": {"num_layers_per_stack": 2, "H_cycles": 1, "L_cycles": 1, "L_bp_cycles": [1], "num_hidden_layers": 4},
    "kosmos-2": {"latent_query_num": 4},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lilt": {"hidden_size": 96},
    "markuplm": {"tag_pad_id": 216, "subs_pad_id": 1001},
    "mistral4": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16, "head_dim": 16},
    "muse_spark_audio": {"hidden_sizes": [32, 32, 64, 64]},
    "perceiver": {"d_latents": 64, "num_latents": 16, "num_cross_attention_heads": 1},
    "pi0": {"dit_config.head_dim": 16},  # that of the language model, whose keys it reads
    "shieldgemma2": {"yes_token_index": 100, "no_token_index": 101},
    "speecht5": {"vocab_size": 320},
    "swin": {"image_size": 224},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16]},
    "vibevoice_acoustic_tokenizer": {"num_filters": 4},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
}
#: Rows of token ids that make one sample, by `model_type`: a row per codebook.
ROWS = {"musicgen_decoder": 4, "musicgen_melody_decoder": 4}
#: Ids per position, by `model_type`.
STREAMS = {"kyutai_speech_to_text": 33}
#: The same for ids of decoders.
DECODER_STREAMS = {"dia": 9}
#: Frames of a spectrogram that are one input, by `model_type`.
STACKED = {"granite_speech5_ctc": 4}
#: Fields with the bins of spectrograms.
BINS = (
    "num_mel_bins",
    "n_mel_bins",
    "input_feat_per_channel",
    "feature_projection_input_dim",
    "feature_size",
    "input_dim",
)
