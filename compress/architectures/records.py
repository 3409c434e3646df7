"""One record per model family, as transformers 5 names things. To add a family, add a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.architectures.groups import Attention, FusedLayout, Hidden, Mlp, Relative
from compress.architectures.leftovers import Leftover
from compress.architectures.norms import Norms
from compress.architectures.record import Architecture

_QKVO = Attention(
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", free=True, rotary=True
)
#: Queries and keys are normalised head by head.
_NORMED = replace(_QKVO, rotary=False)


def _fused(module: str, output: str, layout: FusedLayout, free: bool = False) -> Attention:
    return Attention(module, module, module, output, layout, free)


_GATED = Mlp(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
#: transformers runs experts by grouped matrix products, whose rows must be multiples of 16 bytes: 8 bfloat16 numbers.
_EXPERTS = Mlp(("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), "mlp.experts.*.down_proj", multiple=8)
_PRE_NORMS = Hidden(("input_layernorm", "post_attention_layernorm"))
_GEMMA_NORMS = Hidden(
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    offset=1.0,
    scaled=True,
)
#: Llama 2 and its like have one in every block; models compute it once.
_INVERSE_FREQUENCIES = Leftover(r"rotary_emb\.inv_freq$")
_DECODER: dict[str, Any] = {
    "leftovers": (_INVERSE_FREQUENCIES,),
    "prefix": "model",
    "blocks": "layers",
    "embeddings": ("embed_tokens",),
    "kv_heads_key": "num_key_value_heads",
    "head_dim_key": "head_dim",
    "scaled_cache": "self_attn",
    "open_attention": True,
}
_LLAMA_LIKE: dict[str, Any] = {
    **_DECODER,
    "attention": _QKVO,
    "mlps": (_GATED,),
    "hidden": _PRE_NORMS,
    "norms": Norms(),
}
_GEMMA_LIKE: dict[str, Any] = {
    **_DECODER,
    "attention": replace(_QKVO, even=True),
    "mlps": (_GATED,),
    "hidden": _GEMMA_NORMS,
    "norms": Norms(mlp="pre_feedforward_layernorm", offset=1.0, behind=True),
}
#: Latent attention (MLA): heads share a rotary key and a latent of keys and values, so that no head can go by itself.
_LATENT: dict[str, Any] = {
    **_DECODER,
    "head_dim_key": None,
    "scaled_cache": None,
    "cache": "latent",
    "attention_parts": tuple(
        f"self_attn.{part}" for part in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    ),
}
#: The block that predicts further tokens, which the class ignores by this number.
_FURTHER_TOKENS = Leftover(r"layers\.61\.")
_POSITION_IDS = Leftover(r"embeddings\.position_ids$")
_LAYER_NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
#: Suffixes of the classes that label single tokens, and of those that label whole texts or tokens.
_TOKENS = ("ForTokenClassification", "ForQuestionAnswering")
_TEXTS = ("ForSequenceClassification", "ForMultipleChoice", *_TOKENS)
_BERT_LIKE: dict[str, Any] = {
    "old_names": _LAYER_NORMS,
    "blocks": "encoder.layer",
    "embeddings": ("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings"),
    "position_table": "embeddings.position_embeddings",
    "causal": False,
    "tie_default": True,
    "mlps": (Mlp(("intermediate.dense",), "output.dense"),),
    "attention": Attention(
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"
    ),
}


def _t5_attention(path: str) -> Attention:
    return Attention(f"{path}.q", f"{path}.k", f"{path}.v", f"{path}.o", free=True)


def _window(config: Mapping[str, Any]) -> int | None:
    """The window of families whose configs mean 4096 tokens where they name none."""
    window: int | None = config.get("sliding_window", 4096)
    return window


def _switched_window(config: Mapping[str, Any]) -> int | None:
    """The window of Qwen's families, which have a switch for it."""
    return _window(config) if config.get("use_sliding_window") else None


def _window_from(config: Mapping[str, Any]) -> list[str]:
    """Kinds of attention of Qwen's blocks: sliding from block ``max_window_layers`` on, if the config uses windows."""
    depth, first = int(config["num_hidden_layers"]), int(config.get("max_window_layers", 28))
    windows = _switched_window(config) is not None
    return ["sliding_attention" if windows and i >= first else "full_attention" for i in range(depth)]


def _windows_every_second(config: Mapping[str, Any]) -> list[str]:
    """Kinds of attention of Qwen2-MoE's blocks: every second slides below ``max_window_layers``, if the config uses windows."""
    last = int(config.get("max_window_layers", 28)) if config.get("use_sliding_window") else 0
    depth = int(config["num_hidden_layers"])
    return ["sliding_attention" if i < last and i % 2 == 0 else "full_attention" for i in range(depth)]


def _full_every(config: Mapping[str, Any], step: int) -> list[str]:
    """Kinds of attention of Gemma's blocks: every ``step``-th is full, the others slide."""
    return [
        "full_attention" if (i + 1) % step == 0 else "sliding_attention"
        for i in range(int(config["num_hidden_layers"]))
    ]


def _full_from(config: Mapping[str, Any], step: int) -> list[str]:
    """Kinds of attention where every ``step``-th block is full, from the first."""
    return ["full_attention" if i % step == 0 else "sliding_attention" for i in range(int(config["num_hidden_layers"]))]


def _all_sliding(config: Mapping[str, Any]) -> list[str]:
    """Kinds of attention of Ministral's blocks: all slide, if the config has a window."""
    kind = "full_attention" if _window(config) is None else "sliding_attention"
    return [kind] * int(config["num_hidden_layers"])


def _positions_by_interval(config: Mapping[str, Any]) -> list[int]:
    """By block of SmolLM3, 1 for rotary positions: all but every n-th."""
    step = int(config.get("no_rope_layer_interval", 4))
    return [int((i + 1) % step != 0) for i in range(int(config["num_hidden_layers"]))]


def _window_without_positions(config: Mapping[str, Any]) -> list[str]:
    """Kinds of attention of SmolLM3's blocks: those without rotary positions slide, if the config uses windows."""
    windows = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    turned = config.get("no_rope_layers") or _positions_by_interval(config)
    return ["full_attention" if mark or not windows else "sliding_attention" for mark in turned]


def _up_to_padding(config: Mapping[str, Any]) -> int:
    """Rows before RoBERTa's first position, which comes after the padding token's id."""
    padding = config.get("pad_token_id")
    return 1 + (1 if padding is None else int(padding))


RECORDS: tuple[Architecture, ...] = (
    Architecture(
        "llama",
        **{**_LLAMA_LIKE, "attention": replace(_QKVO, even=True)},
        relative=Relative(
            "mistral", ("Llama", "Mistral"), {"sliding_window": None}, unless=("attention_bias", "mlp_bias")
        ),
    ),
    Architecture("mistral", **_LLAMA_LIKE, window=_window),
    Architecture(
        "ministral",
        **_LLAMA_LIKE,
        window=_window,
        per_layer=("layer_types",),
        per_layer_defaults={"layer_types": _all_sliding},
    ),
    Architecture(
        "granite_swa",
        eager=True,
        **{**_LLAMA_LIKE, "attention": replace(_QKVO, logits="self_attn.sinks")},
        window=lambda config: config.get("sliding_window", 128),
        per_layer=("layer_types", "layer_rope_theta"),
        per_layer_defaults={"layer_types": lambda config: _full_from(config, 4)},
        tie_default=True,
    ),
    Architecture(
        "cwm",
        **{**_LLAMA_LIKE, "attention": replace(_QKVO, even=True)},
        window=lambda config: config.get("sliding_window", 8192),
        per_layer=("layer_types",),
        per_layer_defaults={"layer_types": lambda config: _full_from(config, 4)},
    ),
    Architecture(
        "smollm3",
        **_LLAMA_LIKE,
        window=lambda config: config.get("sliding_window") if config.get("use_sliding_window") else None,
        per_layer=("layer_types", "no_rope_layers"),
        per_layer_defaults={"layer_types": _window_without_positions, "no_rope_layers": _positions_by_interval},
        tie_default=True,
    ),
    Architecture(
        "olmo3",
        **{
            **_LLAMA_LIKE,
            "attention": replace(_NORMED, norms=("self_attn.q_norm.weight", "self_attn.k_norm.weight")),
            "hidden": Hidden(("post_attention_layernorm", "post_feedforward_layernorm"), epsilon=1e-5),
            "norms": None,
        },
        window=_window,
        per_layer=("layer_types",),
        per_layer_defaults={"layer_types": lambda config: _full_every(config, 4)},
    ),
    Architecture(
        "qwen2",
        **_LLAMA_LIKE,
        window=_switched_window,
        per_layer=("layer_types",),
        per_layer_defaults={"layer_types": _window_from},
    ),
    Architecture(
        "qwen3",
        **{**_LLAMA_LIKE, "attention": _NORMED},
        window=_switched_window,
        per_layer=("layer_types",),
        per_layer_defaults={"layer_types": _window_from},
    ),
    Architecture(
        "gemma2",
        **_GEMMA_LIKE,
        window=_window,
        per_layer=("layer_types",),
        per_layer_defaults={"layer_types": lambda config: _full_every(config, 2)},
        tie_default=True,
    ),
    Architecture(
        "gemma3_text",
        **{**_GEMMA_LIKE, "attention": replace(_NORMED, even=True)},
        window=_window,
        per_layer=("layer_types",),
        per_layer_defaults={
            "layer_types": lambda config: _full_every(config, int(config.get("sliding_window_pattern", 6)))
        },
        tie_default=True,
    ),
    Architecture(
        "phi3",
        **_DECODER,
        mlps=(Mlp(("mlp.gate_up_proj",), "mlp.down_proj", sections=2),),
        attention=replace(_fused("self_attn.qkv_proj", "self_attn.o_proj", "stacked", free=True), rotary=True),
        hidden=replace(_PRE_NORMS, epsilon=1e-5),
        norms=Norms(),
    ),
    Architecture(
        "mixtral",
        **_DECODER,
        mlps=(
            replace(
                _EXPERTS,
                up=("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3"),
                down="block_sparse_moe.experts.*.w2",
            ),
            _EXPERTS,
        ),
        attention=_QKVO,
        hidden=replace(_PRE_NORMS, epsilon=1e-5),
        norms=Norms(),
        renames=((r"\.block_sparse_moe\b", ".mlp"),),
        routers=("block_sparse_moe.gate", "mlp.gate"),
        experts=("block_sparse_moe.experts", "mlp.experts"),
        experts_key="num_local_experts",
        active_experts_key="num_experts_per_tok",
    ),
    Architecture(
        "qwen3_moe",
        **_DECODER,
        mlps=(_GATED, replace(_EXPERTS, size_key="moe_intermediate_size")),
        attention=_NORMED,
        hidden=_PRE_NORMS,
        norms=Norms(),
        window=_switched_window,
        spellings={"num_experts": "num_local_experts"},
        dense_blocks_key="mlp_only_layers",
        sparse_step_key="decoder_sparse_step",
        routers=("mlp.gate",),
        experts=("mlp.experts",),
        experts_key="num_local_experts",
        active_experts_key="num_experts_per_tok",
        expert_sum_key="norm_topk_prob",
    ),
    Architecture(
        "qwen2_moe",
        **_DECODER,
        mlps=(
            _GATED,
            replace(_EXPERTS, size_key="moe_intermediate_size"),
            Mlp(
                ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
                "mlp.shared_expert.down_proj",
                "shared_expert_intermediate_size",
            ),
        ),
        attention=_QKVO,
        hidden=_PRE_NORMS,
        norms=Norms(),
        per_layer=("layer_types",),
        per_layer_defaults={"layer_types": _windows_every_second},
        dense_blocks_key="mlp_only_layers",
        sparse_step_key="decoder_sparse_step",
        routers=("mlp.gate", "mlp.shared_expert_gate"),
        experts=("mlp.experts",),
        experts_key="num_experts",
        active_experts_key="num_experts_per_tok",
        expert_sum_key="norm_topk_prob",
    ),
    Architecture(
        "minicpm3",
        **_LATENT,
        latent={"kv_lora_rank": 256, "qk_rope_head_dim": 32},
        mlps=(_GATED,),
        tie_default=True,
        depth_scaled=("scale_depth",),
    ),
    Architecture(
        "deepseek_v3",
        **{**_LATENT, "leftovers": (*_LATENT["leftovers"], _FURTHER_TOKENS)},
        latent={"kv_lora_rank": 512, "qk_rope_head_dim": 64},
        dense_first_key="first_k_dense_replace",
        routers=("mlp.gate",),
        experts=("mlp.experts",),
        experts_key="n_routed_experts",
        active_experts_key="num_experts_per_tok",
        mlps=(
            _GATED,
            replace(_EXPERTS, size_key="moe_intermediate_size"),
            Mlp(
                ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
                "mlp.shared_experts.down_proj",
                "moe_intermediate_size",
                times="n_shared_experts",
            ),
        ),
    ),
    Architecture(
        "gpt2",
        prefix="transformer",
        blocks="h",
        embeddings=("wte", "wpe"),
        position_table="wpe",
        depth_key="n_layer",
        hidden_key="n_embd",
        heads_key="n_head",
        spellings={"num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head"},
        numbered=("scale_attn_by_inverse_layer_idx",),
        input_axis=0,
        tie_default=True,
        mlps=(Mlp(("mlp.c_fc",), "mlp.c_proj", "n_inner"),),
        attention=_fused("attn.c_attn", "attn.c_proj", "stacked"),
        norms=Norms("ln_1", "ln_2", "ln_f", centred=True),
        open_attention=True,
        leftovers=(Leftover(r"h\.\d+\.(?:attn|crossattention)\.(?:bias|masked_bias)$"),),
    ),
    Architecture(
        "bloom",
        prefix="transformer",
        blocks="h",
        embeddings=("word_embeddings",),
        depth_key="n_layer",
        heads_key="n_head",
        spellings={"num_hidden_layers": "n_layer", "n_embed": "hidden_size", "num_attention_heads": "n_head"},
        tie_default=True,
        mlps=(Mlp(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", None),),
        attention=replace(
            _fused("self_attention.query_key_value", "self_attention.dense", "interleaved"), ordered=True
        ),
        norms=Norms(final="ln_f", centred=True, unless={"apply_residual_connection_post_layernorm": True}),
    ),
    Architecture(
        "gpt_neox",
        prefix="gpt_neox",
        blocks="layers",
        embeddings=("embed_in",),
        renames=((r"^embed_out$", "lm_head"),),
        head="embed_out",
        head_tie="embed_out.weight",
        mlps=(Mlp(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),),
        attention=_fused("attention.query_key_value", "attention.dense", "interleaved"),
        norms=Norms(final="final_layer_norm", centred=True),
        open_attention=True,
        leftovers=(
            Leftover(r"layers\.\d+\.attention\.(?:bias|masked_bias)$"),
            Leftover(r"layers\.\d+\.attention\.rotary_emb\.inv_freq$"),
        ),
    ),
    Architecture(
        "opt",
        prefix="model.decoder",
        blocks="layers",
        embeddings=("embed_tokens", "embed_positions"),
        position_table="embed_positions",
        skipped_positions=lambda config: 2,
        tie_default=True,
        projections=("project_in", "project_out", "word_embed_proj_dim"),
        mlps=(Mlp(("fc1",), "fc2", "ffn_dim"),),
        attention=replace(_QKVO, output="self_attn.out_proj", free=False, rotary=False),
        norms=Norms(
            "self_attn_layer_norm",
            "final_layer_norm",
            "final_layer_norm",
            centred=True,
            unless={"do_layer_norm_before": False},
        ),
        open_attention=True,
    ),
    Architecture(
        "bert",
        prefix="bert",
        pooler="pooler.dense",
        **_BERT_LIKE,
        head="cls.predictions.decoder",
        head_tie="cls.predictions.decoder.weight",
        bias_tie=("cls.predictions.decoder.bias", "cls.predictions.bias"),
        base_class="BertModel",
        leftovers=(
            _POSITION_IDS,
            Leftover(r"pooler\.", ("ForMaskedLM", "LMHeadModel", *_TOKENS)),
            Leftover(r"cls\.predictions\.", ("BertModel", "ForNextSentencePrediction", *_TEXTS)),
            Leftover(r"cls\.seq_relationship\.", ("BertModel", "ForMaskedLM", "LMHeadModel", *_TEXTS)),
        ),
    ),
    Architecture(
        "albert",
        prefix="albert",
        pooler="pooler",
        **{
            **_BERT_LIKE,
            "blocks": "encoder.albert_layer_groups",
            "mlps": (Mlp(("albert_layers.0.ffn",), "albert_layers.0.ffn_output"),),
            "attention": Attention(
                "albert_layers.0.attention.query",
                "albert_layers.0.attention.key",
                "albert_layers.0.attention.value",
                "albert_layers.0.attention.dense",
            ),
        },
        depth_key="num_hidden_groups",
        numbered=("num_hidden_groups",),
        head="predictions.decoder",
        head_tie="predictions.decoder.weight",
        bias_tie=("predictions.decoder.bias", "predictions.bias"),
        base_class="AlbertModel",
        leftovers=(
            _POSITION_IDS,
            Leftover(r"pooler\.|pooler_activation\.", ("ForMaskedLM", *_TOKENS)),
            Leftover(r"predictions\.", ("AlbertModel", *_TEXTS)),
            Leftover(r"sop_classifier\.", ("AlbertModel", "ForMaskedLM", *_TEXTS)),
        ),
    ),
    Architecture(
        "roberta",
        prefix="roberta",
        pooler="pooler.dense",
        **_BERT_LIKE,
        skipped_positions=_up_to_padding,
        head="lm_head.decoder",
        head_tie="lm_head.decoder.weight",
        bias_tie=("lm_head.decoder.bias", "lm_head.bias"),
        base_class="RobertaModel",
        leftovers=(
            _POSITION_IDS,
            Leftover(r"pooler\.", ("ForMaskedLM", "ForCausalLM", "ForSequenceClassification", *_TOKENS)),
            Leftover(r"lm_head\.", ("RobertaModel", *_TEXTS)),
        ),
    ),
    Architecture(
        "electra",
        prefix="electra",
        **_BERT_LIKE,
        head="generator_lm_head",
        head_tie="generator_lm_head.weight",
        head_classes=("ForMaskedLM", "ForCausalLM"),  # its ForPreTraining detects replaced tokens
        base_class="ElectraModel",
        leftovers=(
            _POSITION_IDS,
            Leftover(r"generator_(?:predictions|lm_head)\.", ("ElectraModel", "ForPreTraining", *_TEXTS)),
            Leftover(r"discriminator_predictions\.", ("ElectraModel", "ForMaskedLM", "ForCausalLM", *_TEXTS)),
        ),
    ),
    Architecture(
        "distilbert",
        prefix="distilbert",
        blocks="transformer.layer",
        embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings"),
        position_table="embeddings.position_embeddings",
        head="vocab_projector",
        head_tie="vocab_projector.weight",
        depth_key="n_layers",
        hidden_key="dim",
        heads_key="n_heads",
        spellings={"num_hidden_layers": "n_layers", "hidden_size": "dim", "num_attention_heads": "n_heads"},
        causal=False,
        tie_default=True,
        base_class="DistilBertModel",
        leftovers=(
            _POSITION_IDS,
            Leftover(r"vocab_(?:transform|layer_norm|projector)\.", ("DistilBertModel", *_TEXTS)),
        ),
        old_names=_LAYER_NORMS,
        mlps=(Mlp(("ffn.lin1",), "ffn.lin2", "hidden_dim"),),
        attention=Attention("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    ),
    Architecture(
        "t5",
        prefix="transformer",  # only its classifiers have it
        blocks="encoder.block",
        stacks={"decoder.block": "num_decoder_layers"},
        packable=False,  # transformers 5.24 looks for `weight` in every layer when it loads this family
        flat_classes=("ForConditionalGeneration", "ForQuestionAnswering"),
        embeddings=("shared",),
        head_classes=("ForConditionalGeneration",),
        depth_key="num_layers",
        hidden_key="d_model",
        heads_key="num_heads",
        head_dim_key="d_kv",
        spellings={"num_hidden_layers": "num_layers", "hidden_size": "d_model", "num_attention_heads": "num_heads"},
        causal=False,
        tie_default=True,
        mlps=tuple(
            Mlp(tuple(f"layer.{place}.DenseReluDense.{up}" for up in ups), f"layer.{place}.DenseReluDense.wo", "d_ff")
            for place in (1, 2)  # in the encoder, and in the decoder
            for ups in (("wi",), ("wi_0", "wi_1"))
        ),
        attention=replace(
            _t5_attention("layer.0.SelfAttention"), table="layer.0.SelfAttention.relative_attention_bias"
        ),
        cross=_t5_attention("layer.1.EncDecAttention"),
        copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        leftovers=(
            Leftover(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$"),
            Leftover(r"(?:decoder|lm_head)\.", ("EncoderModel", "ForTokenClassification")),
        ),
    ),
    Architecture(
        "vit",
        prefix="vit",
        pooler="pooler.dense",
        blocks="encoder.layer",
        module_blocks="layers",
        renames=(
            (r"\bencoder\.layer\.", "layers."),
            (r"\.attention\.query$", ".q_proj"),
            (r"\.attention\.key$", ".k_proj"),
            (r"\.attention\.value$", ".v_proj"),
            (r"\.attention\.output\.dense$", ".attention.o_proj"),
            (r"\.intermediate\.dense$", ".mlp.fc1"),
            (r"\.output\.dense$", ".mlp.fc2"),
        ),
        embeddings=("embeddings.patch_embeddings.projection",),
        input="pixel_values",
        head=None,
        causal=False,
        head_dim_key="head_dim",
        mlps=(Mlp(("intermediate.dense",), "output.dense"),),
        attention=Attention(
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
            "attention.output.dense",
            free=True,
        ),
        leftovers=(Leftover(r"pooler\.", ("ForImageClassification", "ForMaskedImageModeling")),),
    ),
)
