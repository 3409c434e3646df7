"""Families of GGUF files: names of tensors, fields of the config, and what the converter changed in them.

The converter (convert_hf_to_gguf.py of llama.cpp) permutes rows of queries and keys for Llama's kind of rotary embedding, and
adds one to the norms of Gemma. Both are undone on reading. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import pi
from typing import Any

from compress.architectures.gguf.metadata import Metadata, shortest

#: Part of a block's tensor name ▶ the module in the stock class.
_BLOCK: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMED = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OUTSIDE: Mapping[str, str] = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
#: Tensors that only hold factors of rotary embeddings, which the config has instead.
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """One architecture of GGUF files.

    Attributes:
        model_type, class_name: of the stock class. blocks: part of a name ▶ module, for the tensors of blocks.
        permuted: whether rows of queries and keys are permuted. raised: whether one is added to norms.
            ``{}`` in it stands for the number of an expert, of which the file holds all in one tensor.
        config: fields of the config beyond the common ones.
        prefix: of the names of blocks. outside: as ``blocks``, for tensors outside them.
        transposed: ends of the modules whose matrices the stock class stores [I, O].
        rotary: whether it is a decoder with RMS norms and rotary embeddings, whose `common` fields are alike.
        scaled: whether llama.cpp 0.5.0 multiplies products of its matrices with nvfp4's global scales.
    """

    model_type: str
    class_name: str
    blocks: Mapping[str, str]
    config: Callable[[Metadata], dict[str, Any]]
    permuted: bool = False
    raised: bool = False
    outside: Mapping[str, str] = field(default_factory=lambda: OUTSIDE)
    prefix: str = "model.layers"
    transposed: tuple[str, ...] = ()
    rotary: bool = True
    scaled: bool = False


def config_of(family: GgufFamily, metadata: Metadata) -> dict[str, Any]:
    """The config of the stock class."""
    config = {**(_common(metadata) if family.rotary else {}), **family.config(metadata)}
    return config | {"model_type": family.model_type, "architectures": [family.class_name]}


def _vocabulary(metadata: Metadata) -> dict[str, Any]:
    """Fields of the config on the vocabulary."""
    shape = metadata.shapes.get("token_embd.weight", ())
    if len(shape) != 2:
        raise metadata.error("has no table of embeddings, token_embd.weight")
    ids = {
        key: metadata.raw(f"tokenizer.ggml.{name}_token_id")
        for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
    }
    return {
        "vocab_size": shape[0],
        "tie_word_embeddings": "output.weight" not in metadata.shapes,
        **{key: value if type(value) is int else None for key, value in ids.items()},
    }


def _common(metadata: Metadata) -> dict[str, Any]:
    """Fields of the config that families with rotary embeddings have."""
    heads = metadata.count("attention.head_count")
    config = {
        **_vocabulary(metadata),
        "hidden_size": metadata.count("embedding_length"),
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": metadata.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", heads),
        "max_position_embeddings": metadata.count("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
    }
    return config | _rope_scaling(metadata)


def _rope_scaling(metadata: Metadata) -> dict[str, Any]:
    """``rope_scaling`` of a config; empty without any. Raises `CheckpointError` for a kind that is not known."""
    kind = metadata.text("rope.scaling.type")
    factors = [name for name in FACTORS if name in metadata.shapes]
    if factors or kind in (None, "none", "longrope"):
        return {}  # the family reads the factors
    scaling: dict[str, Any] = {"rope_type": kind, "factor": metadata.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = metadata.count("rope.scaling.original_context_length")
    elif kind != "linear":
        raise metadata.error(f"has the rotary scaling {kind!r}, which this version cannot read")
    return {"rope_scaling": scaling}


def _head_dim(metadata: Metadata) -> int:
    """Width of a head, which queries and keys have."""
    width = metadata.count("embedding_length") // metadata.count("attention.head_count")
    return metadata.count("attention.key_length", width)


def _llama(metadata: Metadata) -> dict[str, Any]:
    """Llama, Mistral and SmolLM; biases are told from tensors."""
    ends = ("attn_q", "attn_k", "attn_v", "attn_output")
    biases = {f"blk.0.{end}.bias" in metadata.shapes for end in ends}
    if len(biases) > 1:
        raise metadata.error("has biases in some projections of its attention alone, which LlamaForCausalLM has not")
    dims = metadata.count("rope.dimension_count", _head_dim(metadata))
    if metadata.has("attention.key_length") and dims != _head_dim(metadata):
        raise metadata.error("rotates a part of each head alone, which LlamaForCausalLM does not")
    config: dict[str, Any] = {
        "head_dim": dims,
        "attention_bias": biases == {True},
        "mlp_bias": "blk.0.ffn_gate.bias" in metadata.shapes,
    }
    if "rope_freqs.weight" in metadata.shapes:
        config["rope_scaling"] = _llama3(metadata, dims)
    return config


def _llama3(metadata: Metadata, width: int) -> dict[str, Any]:
    """The scaling of Llama 3.1 and later, whose parameters the file does not hold, recognised by the factors it gives."""
    factors = metadata.read("rope_freqs.weight")
    base, original, low, high = metadata.number("rope.freq_base", 10000.0), 8192, 1.0, 4.0
    factor = float(round(max(factors)))
    expected = llama3_factors(base, width, factor, low, high, original)
    if len(factors) != len(expected) or any(abs(a - b) > 1e-4 * b for a, b in zip(factors, expected, strict=True)):
        raise metadata.error("has rotary factors (rope_freqs.weight) that are not those of Llama 3")
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return {**scaling, "original_max_position_embeddings": original}


def llama3_factors(base: float, width: int, factor: float, low: float, high: float, original: float) -> list[float]:
    """Factors by which Llama 3 divides the rotary frequencies of a head.

    Args:
        base: of the frequencies. width: of a head. factor, low, high, original: of the config's rotary scaling.
    """
    result = []
    for place in range(0, width, 2):
        wave = 2 * pi * base ** (place / width)
        smooth = (original / wave - low) / (high - low)
        full, none = wave < original / high, wave > original / low
        result.append(1.0 if full else factor if none else 1 / ((1 - smooth) / factor + smooth))
    return result


def _qwen2(metadata: Metadata) -> dict[str, Any]:
    return {"use_sliding_window": False}


def _qwen3(metadata: Metadata) -> dict[str, Any]:
    return {"head_dim": _head_dim(metadata), "attention_bias": False, "use_sliding_window": False}


def _qwen3_moe(metadata: Metadata) -> dict[str, Any]:
    return {
        **_qwen3(metadata),
        "num_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
        "moe_intermediate_size": metadata.count("expert_feed_forward_length"),
        "norm_topk_prob": True,  # llama.cpp has no other
        "mlp_only_layers": [],
    }


def _mixtral(metadata: Metadata) -> dict[str, Any]:
    experts = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
    llama = _llama(metadata)
    if llama.pop("attention_bias") | llama.pop("mlp_bias"):
        raise metadata.error("has biases, which MixtralForCausalLM has not")
    return {**llama, **{key: metadata.count(name) for key, name in experts.items()}, "sliding_window": None}


def _scale(metadata: Metadata, largest: int) -> int:
    """Number whose root divides the scores: the head's width, but hidden / heads in the largest model of a generation."""
    if metadata.count("block_count") == largest:
        return metadata.count("embedding_length") // metadata.count("attention.head_count")
    return _head_dim(metadata)


def _gemma2(metadata: Metadata) -> dict[str, Any]:
    return {
        "head_dim": _head_dim(metadata),
        "query_pre_attn_scalar": _scale(metadata, 46),
        "sliding_window": metadata.count("attention.sliding_window", 4096),
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 30.0),
    }


def _gemma3(metadata: Metadata) -> dict[str, Any]:
    capped = metadata.has("final_logit_softcapping")
    return {
        "head_dim": _head_dim(metadata),
        "query_pre_attn_scalar": _scale(metadata, 62),
        "sliding_window": metadata.count("attention.sliding_window"),
        "sliding_window_pattern": metadata.count("attention.sliding_window_pattern", 6),
        "rope_theta": metadata.number("rope.freq_base", 1000000.0),
        "rope_local_base_freq": metadata.number("rope.freq_base_swa", 10000.0),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": metadata.number("final_logit_softcapping") if capped else None,
    }


def _phi3(metadata: Metadata) -> dict[str, Any]:
    width = _head_dim(metadata)
    config: dict[str, Any] = {
        "partial_rotary_factor": metadata.count("rope.dimension_count", width) / width,
        "original_max_position_embeddings": metadata.count(
            "rope.scaling.original_context_length", metadata.count("context_length")
        ),
    }
    if metadata.has("attention.sliding_window"):
        window = metadata.raw("phi3.attention.sliding_window")
        config["sliding_window"] = metadata.count("attention.sliding_window") if window else None
    if "rope_factors_long.weight" in metadata.shapes:
        short, long = (metadata.read(f"rope_factors_{kind}.weight") for kind in ("short", "long"))
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": [shortest(x) for x in short],
            "long_factor": [shortest(x) for x in long],
        }
    return config


def _gpt2(metadata: Metadata) -> dict[str, Any]:
    width = metadata.count("embedding_length")
    inner = metadata.count("feed_forward_length", 4 * width)
    return {
        **_vocabulary(metadata),
        "n_embd": width,
        "n_inner": None if inner == 4 * width else inner,
        "n_layer": metadata.count("block_count"),
        "n_head": metadata.count("attention.head_count"),
        "n_positions": metadata.count("context_length"),
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon", 1e-5),
        "activation_function": "gelu_new",
    }


def _with(*more: Mapping[str, str]) -> Mapping[str, str]:
    return {key: value for names in (_BLOCK, *more) for key, value in names.items()}


def _experts(gate: str, experts: str, parts: tuple[str, str, str]) -> dict[str, str]:
    """Names of a router and of the parts of experts: gate, up, down."""
    names = zip(("gate", "up", "down"), parts, strict=True)
    return {"ffn_gate_inp": gate, **{f"ffn_{part}_exps": f"{experts}.{{}}.{name}" for part, name in names}}


def _without(parts: Iterable[str], more: Mapping[str, str]) -> Mapping[str, str]:
    return {key: value for key, value in _BLOCK.items() if key not in set(parts)} | dict(more)


_DENSE = ("ffn_gate", "ffn_up", "ffn_down")
#: Architecture in the file ▶ family.
FAMILIES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily("llama", "LlamaForCausalLM", _BLOCK, _llama, permuted=True, scaled=True),
    "llama with experts": GgufFamily(
        "mixtral",
        "MixtralForCausalLM",
        _without(_DENSE, _experts("block_sparse_moe.gate", "block_sparse_moe.experts", ("w1", "w3", "w2"))),
        _mixtral,
        permuted=True,
    ),
    "qwen3moe with experts": GgufFamily(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _without(_DENSE, {**_NORMED, **_experts("mlp.gate", "mlp.experts", ("gate_proj", "up_proj", "down_proj"))}),
        _qwen3_moe,
    ),
    "qwen2": GgufFamily("qwen2", "Qwen2ForCausalLM", _BLOCK, _qwen2),
    "qwen3": GgufFamily("qwen3", "Qwen3ForCausalLM", _with(_NORMED), _qwen3, scaled=True),
    "gemma2": GgufFamily("gemma2", "Gemma2ForCausalLM", _with(_SANDWICH), _gemma2, raised=True),
    "gemma3": GgufFamily("gemma3_text", "Gemma3ForCausalLM", _with(_SANDWICH, _NORMED), _gemma3, raised=True),
    "phi3": GgufFamily(
        "phi3",
        "Phi3ForCausalLM",
        _without(
            ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"),
            {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        ),
        _phi3,
    ),
    "gpt2": GgufFamily(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        _gpt2,
        outside={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        prefix="transformer.h",
        transposed=(".c_attn", ".c_proj", ".c_fc"),
        rotary=False,
    ),
}
