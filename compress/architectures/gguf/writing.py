"""A model as a GGUF file: config of the stock class ▶ metadata, and names in the file.

Facts follow llama.cpp's converter (conversion/*.py) and its loader (src/models). Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import log, sqrt
from typing import Any

from compress.architectures.gguf.families import FAMILIES, GgufFamily, llama3_factors
from compress.errors import PassError

#: A value of the metadata: uint32, float32, bool, string, or an array of these.
MetadataValue = int | float | bool | str | list[int]


class UnwritableError(PassError):
    """A model that llama.cpp does not compute as transformers does."""


@dataclass(frozen=True, slots=True)
class GgufPlace:
    """Place of a stock tensor in a GGUF file.

    Attributes:
        name: in the file. expert: number of the expert, whose file tensor holds all; None for others.
        heads: into how many heads its permuted rows fall; 0 for rows in their order. raised: whether one is added.
        transposed: whether the stock tensor is [I, O]. wide: whether llama.cpp wants float32.
    """

    name: str
    expert: int | None = None
    heads: int = 0
    raised: bool = False
    transposed: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """A model as a GGUF file: architecture, its metadata without that prefix, the tensors by stock name, and further ones.

    ``scaled``: whether llama.cpp multiplies products of its matrices with nvfp4's global scales.
    """

    architecture: str
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, GgufPlace]
    factors: Mapping[str, list[float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    scaled: bool = False


class _Config:
    """A stock config that is asked for what metadata need."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        self.local = rope.get("sliding_attention") if isinstance(rope.get("sliding_attention"), Mapping) else None
        full = rope.get("full_attention")
        self.rope: Mapping[str, Any] = full if isinstance(full, Mapping) else rope

    def get(self, key: str, default: Any = None) -> Any:
        """A field; the default where it is missing or null."""
        value = self.config.get(key)
        return default if value is None else value

    def count(self, *keys: str) -> int:
        """A positive integer, by one of several spellings."""
        for key in keys:
            if type(value := self.config.get(key)) is int and value > 0:
                return value
        raise UnwritableError(f"the config has no usable `{keys[0]}`")

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.count("num_attention_heads", "n_head")

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return int(self.get("num_key_value_heads", self.heads))

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return int(self.get("head_dim", self.count("hidden_size", "n_embd") // self.heads))

    @property
    def theta(self) -> float:
        """Base of the rotary frequencies."""
        return float(self.get("rope_theta", self.rope.get("rope_theta", 10000.0)))

    @property
    def rope_type(self) -> str:
        """Kind of rotary scaling."""
        return str(self.rope.get("rope_type", self.rope.get("type", "default")) or "default")

    def require(self, key: str, *values: Any) -> None:
        """Raise `UnwritableError` unless a field, where there is one, has one of the values."""
        if (value := self.config.get(key)) is not None and value not in values:
            raise UnwritableError(f"llama.cpp has no `{key}: {value}` for models of the type {self.get('model_type')}")


Values = dict[str, MetadataValue]
Extra = Callable[[_Config, Values, dict[str, list[float]]], tuple[str, ...]]


def gguf_layout(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> GgufLayout:
    """The layout of a model in a GGUF file.

    Args:
        config: of the stock class. shapes: of its tensors, without aliases.

    Raises:
        UnwritableError: llama.cpp has no such family, or does not compute what the config asks for.
    """
    kind = str(config.get("model_type"))
    known = {family.model_type: name for name, family in FAMILIES.items()} | {"mistral": "llama"}
    if kind not in known or kind not in _EXTRA:
        raise UnwritableError(
            f"models of the type `{kind}` are not written as GGUF", fix=f"it writes {', '.join(sorted(_EXTRA))}"
        )
    family, fields = FAMILIES[known[kind]], _Config(config)
    metadata, factors = _common(fields), dict[str, list[float]]()
    notes = _EXTRA[kind](fields, metadata, factors)
    tensors = {name: _place(name, family, fields) for name in shapes}
    architecture, widths = known[kind].partition(" ")[0], _widths(shapes, family)
    if len(set(widths)) > 1:
        raise UnwritableError(
            f"llama.cpp has one width of MLPs for all blocks of {kind}, and these have {min(widths)} to {max(widths)}",
            fix="prune with `allocation: uniform`",
        )
    if widths:
        metadata["feed_forward_length"] = widths[0]
    return GgufLayout(architecture, metadata, tensors, factors, notes, family.scaled)


def _common(fields: _Config) -> Values:
    """Values that all families have."""
    return {
        "block_count": fields.count("num_hidden_layers", "n_layer"),
        "context_length": fields.count("max_position_embeddings", "n_positions"),
        "embedding_length": fields.count("hidden_size", "n_embd"),
        "attention.head_count": fields.heads,
        "vocab_size": fields.count("vocab_size"),
    }


def _widths(shapes: Mapping[str, tuple[int, ...]], family: GgufFamily) -> list[int]:
    """Inputs of the MLP's last matrix of each block; empty for models of experts alone."""
    module = family.blocks.get("ffn_down", "")
    axis = 0 if module.endswith(family.transposed or ("*",)) else 1
    pattern = re.compile(rf"{_start(family)}{re.escape(module)}\.weight")
    rows = [(int(match[1]), shapes[name][axis]) for name in shapes if (match := pattern.fullmatch(name))]
    return [width for _, width in sorted(rows)]


def _start(family: GgufFamily) -> str:
    """Pattern of the beginning of the names of a block's tensors, with the block's number."""
    prefix, _, blocks = family.prefix.partition(".")
    return rf"(?:{re.escape(prefix)}\.)?{re.escape(blocks)}\.(\d+)\."


def _place(name: str, family: GgufFamily, fields: _Config) -> GgufPlace:
    """Place of a stock tensor. Raises `UnwritableError` for one that the family has not."""
    module, _, end = name.rpartition(".")
    for part, known in family.outside.items():
        if module in (known, known.partition(".")[2]):  # files of the base class leave the prefix out
            return GgufPlace(f"{part}.{end}", raised=family.raised and "norm" in part, wide=part == "position_embd")
    if (start := re.match(_start(family), name)) is not None:
        for part, known in family.blocks.items():
            match = re.fullmatch(re.escape(known).replace(r"\{\}", r"(\d+)"), module[start.end() :])
            if match is None:
                continue
            heads = {"attn_q": fields.heads, "attn_k": fields.kv_heads}.get(part, 0) if family.permuted else 0
            return GgufPlace(
                f"blk.{start[1]}.{part}.{end}",
                expert=int(match[1]) if match.groups() else None,
                heads=heads,
                raised=family.raised and part.endswith("norm"),
                transposed=end == "weight" and known.endswith(family.transposed or ("*",)),
                wide=part == "ffn_gate_inp",
            )
    raise UnwritableError(f"llama.cpp's {family.class_name} has no tensor {name}")


# ---- families ----


def _rms(fields: _Config, metadata: Values) -> None:
    """Values of decoders with RMS norms and rotary embeddings."""
    metadata["attention.head_count_kv"] = fields.kv_heads
    metadata["attention.key_length"] = metadata["attention.value_length"] = fields.head_dim
    metadata["attention.layer_norm_rms_epsilon"] = float(fields.get("rms_norm_eps", 1e-6))
    metadata["rope.freq_base"] = fields.theta
    metadata["rope.dimension_count"] = fields.head_dim
    fields.require("hidden_act", "silu", "swish")


def _scaling(fields: _Config, metadata: Values, factors: dict[str, list[float]]) -> None:
    """Values of a rotary scaling. Raises `UnwritableError` for a kind that llama.cpp has not."""
    kind, rope = fields.rope_type, fields.rope
    if kind == "default":
        return
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        values = (float(rope[name]) for name in names)
        factors["rope_freqs.weight"] = llama3_factors(fields.theta, fields.head_dim, *values)
    elif kind in ("linear", "yarn"):
        metadata["rope.scaling.type"] = kind
        metadata["rope.scaling.factor"] = float(rope["factor"])
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings") or fields.count("max_position_embeddings")
            metadata["rope.scaling.original_context_length"] = int(original)
    else:
        raise UnwritableError(f"llama.cpp has no rotary scaling {kind!r} for {fields.get('model_type')}")


def _window(fields: _Config) -> tuple[str, ...]:
    """A note where the model has windows that llama.cpp's architecture has not."""
    window, kinds = fields.get("sliding_window"), fields.get("layer_types")
    windowed = "sliding_attention" in kinds if isinstance(kinds, list) else bool(fields.get("use_sliding_window", True))
    if not window or not windowed or window >= fields.count("max_position_embeddings"):
        return ()
    return (
        f"llama.cpp has no attention windows for this family: texts of more than {window} tokens give other logits",
    )


def _llama(fields: _Config, metadata: Values, factors: dict[str, list[float]]) -> tuple[str, ...]:
    _rms(fields, metadata)
    _scaling(fields, metadata, factors)
    return _window(fields)


def _qwen(fields: _Config, metadata: Values, factors: dict[str, list[float]]) -> tuple[str, ...]:
    _rms(fields, metadata)
    fields.require("attention_bias", False)
    _scaling(fields, metadata, factors)
    return _window(fields)


def _experts(fields: _Config, metadata: Values, width: str) -> None:
    metadata["expert_count"] = fields.count("num_experts", "num_local_experts")
    metadata["expert_used_count"] = fields.count("num_experts_per_tok")
    metadata["feed_forward_length"] = fields.count("intermediate_size")
    if width:
        metadata["expert_feed_forward_length"] = fields.count(width)


def _qwen3_moe(fields: _Config, metadata: Values, factors: dict[str, list[float]]) -> tuple[str, ...]:
    fields.require("norm_topk_prob", True)
    fields.require("mlp_only_layers", [])
    fields.require("decoder_sparse_step", 1)
    _experts(fields, metadata, "moe_intermediate_size")
    return _qwen(fields, metadata, factors)


def _mixtral(fields: _Config, metadata: Values, factors: dict[str, list[float]]) -> tuple[str, ...]:
    _experts(fields, metadata, "")
    return _llama(fields, metadata, factors)


def _gemma(fields: _Config, metadata: Values, largest: int, period: int) -> None:
    """Values of Gemma 2 and 3, whose blocks have windows, but each ``period``-th."""
    depth = fields.count("num_hidden_layers")
    _rms(_Config({**fields.config, "hidden_act": None}), metadata)
    for key in ("hidden_activation", "hidden_act"):
        fields.require(key, "gelu_pytorch_tanh")
    scale = fields.count("hidden_size") // fields.heads if depth == largest else fields.head_dim
    fields.require("query_pre_attn_scalar", scale)
    kinds = fields.get("layer_types") or []
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(depth)]
    if kinds and kinds != expected:
        raise UnwritableError(
            f"llama.cpp has windows in all blocks of {fields.get('model_type')} but each {period}th",
            fix=f"remove blocks in groups of {period}",
        )
    metadata["attention.sliding_window"] = fields.count("sliding_window")


def _gemma2(fields: _Config, metadata: Values, factors: dict[str, list[float]]) -> tuple[str, ...]:
    _gemma(fields, metadata, 46, 2)
    for key, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        metadata[key] = float(fields.get(key, default))
    return ()


def _gemma3(fields: _Config, metadata: Values, factors: dict[str, list[float]]) -> tuple[str, ...]:
    period = _period(fields)
    _gemma(fields, metadata, 62, period)
    metadata["attention.sliding_window_pattern"] = period
    metadata["rope.freq_base"] = float(fields.get("rope_theta", fields.rope.get("rope_theta", 1e6)))
    local = fields.local or {}
    metadata["rope.freq_base_swa"] = float(fields.get("rope_local_base_freq", local.get("rope_theta", 10000.0)))
    if fields.get("final_logit_softcapping"):
        metadata["final_logit_softcapping"] = float(fields.get("final_logit_softcapping"))
    fields.require("attn_logit_softcapping", 0)
    _scaling(fields, metadata, factors)
    return ()


def _period(fields: _Config) -> int:
    """Blocks from one without a window to the next."""
    kinds = fields.get("layer_types")
    if isinstance(kinds, list) and "full_attention" in kinds:
        return kinds.index("full_attention") + 1
    return int(fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6)))


def _phi3(fields: _Config, metadata: Values, factors: dict[str, list[float]]) -> tuple[str, ...]:
    _rms(fields, metadata)
    del metadata["attention.key_length"], metadata["attention.value_length"]
    share = fields.get("partial_rotary_factor", fields.rope.get("partial_rotary_factor", 1.0))
    longest = fields.count("max_position_embeddings")
    original = int(
        fields.get("original_max_position_embeddings", fields.rope.get("original_max_position_embeddings")) or longest
    )
    metadata["rope.dimension_count"] = int(share * fields.head_dim)
    metadata["rope.scaling.original_context_length"] = original
    metadata["attention.sliding_window"] = int(fields.get("sliding_window", 0))
    if fields.rope_type == "longrope":
        scale = longest / original
        metadata["rope.scaling.attn_factor"] = sqrt(1 + log(scale) / log(original)) if scale > 1 else 1.0
        factors["rope_factors_long.weight"] = [float(x) for x in fields.rope["long_factor"]]
        factors["rope_factors_short.weight"] = [float(x) for x in fields.rope["short_factor"]]
    elif fields.rope_type != "default":
        raise UnwritableError(f"llama.cpp has no rotary scaling {fields.rope_type!r} for phi3")
    return _window(fields)


def _gpt2(fields: _Config, metadata: Values, factors: dict[str, list[float]]) -> tuple[str, ...]:
    fields.require("activation_function", "gelu_new", "gelu_pytorch_tanh")
    fields.require("scale_attn_by_inverse_layer_idx", False)
    fields.require("scale_attn_weights", True)
    metadata["attention.layer_norm_epsilon"] = float(fields.get("layer_norm_epsilon", 1e-5))
    return ()


_EXTRA: Mapping[str, Extra] = {
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _mixtral,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "qwen3_moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
}
