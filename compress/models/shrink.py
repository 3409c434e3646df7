"""Configs of the same kind with few and narrow blocks.

A pico model of a family answers questions about its wiring in seconds. Every kind of block is kept: lists with an entry per
block are cut in step, and numbers of blocks are renumbered. Sizes are chosen by the names of fields and by what divides what.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.architectures import pico_sizes
from compress.models.block_kinds import DEPTHS, depth_of, is_indices, kept_blocks
from compress.models.classes import quiet_transformers

#: Sizes of a pico model.
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, EXPERTS, ACTIVE, VOCABULARY, POSITIONS, WINDOW = (
    64, 4, 2, 16, 96, 4, 2, 320, 128, 8
)  # fmt: skip
_TOKENS = re.compile(
    r"\w*(token_(id|ids|index|idx)|_(start|end|newline|patch|pad)_id|(vocab|token)_offset|suppress_tokens|_index)"
)
_VOCABULARIES = re.compile(r"\w*(vocab_size|vocab_size_\w+|num_embeddings|group_vocab|num_hash_buckets)")
_POSITIONS = re.compile(
    r"\w*(max_\w*position\w*|n_positions|n_ctx|max_seq_len|seq_len|model_max_length|max_\w+_positions|context_length"
    r"|original_max_position_embeddings)"
)
_LEFT_OUT = ("quantization_config", "auto_map", "transformers_version", "_name_or_path")
#: Sections that are no configs of models.
_PLAIN = re.compile(
    r"(id2label|label2id|rope_parameters|rope_scaling|quantization_config|task_specific_params|\w*_map)"
)


def shrunken(config: Any) -> Any:
    """A config of the same class as a transformers config, with 2 to 4 blocks of width 64, in float32.

    Special tokens are moved inside the vocabulary of 320; stored quantisation is left out.

    Raises:
        Exception: transformers refuses the sizes.
    """
    with quiet_transformers():
        data = shrunken_fields(config.to_dict())
        return type(config).from_dict(data)


def default_config(kind: str) -> Any:
    """Transformers' config of a model type, with what its class needs and the type's default leaves out."""
    import transformers

    with quiet_transformers():
        try:
            config = transformers.AutoConfig.for_model(kind)
        except Exception:  # validators of transformers raise errors of their own
            config = transformers.AutoConfig.for_model(kind, **copy.deepcopy(pico_sizes.DEFAULTS.get(kind, {})))
        if not _types(data := config.to_dict()) & pico_sizes.DEFAULTS.keys():
            return config
        return type(config).from_dict(_filled(data))


def _types(data: Mapping[str, Any]) -> set[str]:
    """Model types of a config and of those nested in it."""
    inner = (_types(value) for value in data.values() if isinstance(value, Mapping))
    return {str(data.get("model_type"))}.union(*inner)


def _filled(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config with `pico_sizes.DEFAULTS` in each of its sections."""
    result = {key: _filled(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    for key, value in pico_sizes.DEFAULTS.get(str(data.get("model_type")), {}).items():
        known = result.get(key)
        result[key] = (
            {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else copy.deepcopy(value)
        )
    return result


def shrunken_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `shrunken`, from all fields of a config, defaults included."""
    return _Shrink(data).section(data)


@dataclass(frozen=True)
class _Section:
    """Sizes of one config among nested ones."""

    data: Mapping[str, Any]
    hidden: int
    heads: int
    head_dim: int

    @classmethod
    def of(cls, data: Mapping[str, Any], outer: _Section | None) -> _Section:
        hidden = _first(
            data, "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "model_dim", "encoder_hidden_size"
        )
        heads = _first(
            data,
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "attention_heads",
            "encoder_num_attention_heads",
        )
        hidden = hidden or (outer.hidden if outer else 0)
        width = _first(data, "head_dim", "d_kv", "attention_head_dim", "kv_channels", "d_head", "dim_head")
        return cls(data, hidden, heads, width)

    @property
    def staged(self) -> bool:
        """Whether widths differ from stage to stage, as in convolutional networks."""
        return any(isinstance(self.data.get(name), (list, tuple)) for name in pico_sizes.STAGED)

    @property
    def untied(self) -> bool:
        """Whether heads together are not as wide as the hidden state."""
        return bool(self.head_dim and self.heads and self.head_dim * self.heads != self.hidden)


def _first(data: Mapping[str, Any], *names: str) -> int:
    values = (data.get(name) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), 0)


class _Shrink:
    def __init__(self, data: Mapping[str, Any]) -> None:
        self._tokens: dict[int, int] = {}
        self._data = data

    def section(self, data: Mapping[str, Any], outer: _Section | None = None) -> dict[str, Any]:
        """The fields of one config and of those nested in it."""
        sizes = _Section.of(data, outer)
        result: dict[str, Any] = {}
        blocks = kept_blocks(data)
        for key, value in data.items():
            if key in ("dtype", "torch_dtype"):
                result[key] = None if value is None else "float32"
            elif key in _LEFT_OUT or (key in ("stage_names", "out_features", "out_indices") and not sizes.staged):
                continue
            elif isinstance(value, Mapping):
                result[key] = self._nested(key, value, sizes, blocks)
            else:
                result[key] = self._field(key, value, sizes, blocks)
        kind = str(data.get("model_type"))
        for name, value in pico_sizes.EXCEPTIONS.get(kind, {}).items():
            inner, _, last = name.rpartition(".")
            if not inner or inner in result:
                (result[inner] if inner else result)[last] = value
        return result

    def _nested(self, key: str, value: Mapping[str, Any], sizes: _Section, blocks: Sequence[int]) -> Any:
        if key == "per_layer_config":
            known = {int(k): v for k, v in value.items()}
            own = {i: {k: known[i][k] for k in known[i]} for i in blocks if i in known}
            return {str(new): self._own(own[old], sizes, blocks) for new, old in enumerate(blocks) if old in own}
        if key in ("rope_parameters", "rope_scaling"):
            return self._rotary(value, sizes)
        return (
            dict(value)
            if _PLAIN.fullmatch(key) or not all(isinstance(k, str) for k in value)
            else self.section(value, sizes)
        )

    def _own(self, fields: Mapping[str, Any], sizes: _Section, blocks: Sequence[int]) -> dict[str, Any]:
        """Fields of one block that replace those of its config."""
        whole = _Section.of({**sizes.data, **fields}, None)
        return {key: self._field(key, value, whole, blocks) for key, value in fields.items()}

    def _rotary(self, value: Mapping[str, Any], sizes: _Section) -> dict[str, Any]:
        """Rotary parameters with factors and sections for the new width of heads."""
        result = dict(value)
        part = float(value.get("partial_rotary_factor") or sizes.data.get("partial_rotary_factor") or 1)
        half = max(1, int(self.rotary(sizes) * part) // 2)
        for key, inner in value.items():
            if isinstance(inner, Mapping):
                result[key] = self._rotary(inner, sizes)
            elif key in ("short_factor", "long_factor") and isinstance(inner, list):
                result[key] = inner[:half]
            elif key == "mrope_section" and isinstance(inner, list):
                result[key] = _sections(inner, half)
            elif key == "original_max_position_embeddings" and isinstance(inner, int):
                result[key] = min(inner, POSITIONS // 2)
        return result

    def rotary(self, sizes: _Section) -> int:
        """Width of the rotated part of a head."""
        if _first(sizes.data, "qk_rope_head_dim"):
            return 8
        return self.head_dim(sizes)

    def head_dim(self, sizes: _Section) -> int:
        return 2 * HEAD_DIM if sizes.untied else HEAD_DIM

    def _field(self, key: str, value: Any, sizes: _Section, blocks: Sequence[int]) -> Any:
        if isinstance(value, (list, tuple)):
            return self._list(key, list(value), sizes, blocks)
        if value is None and sizes.heads and sizes.hidden:
            return {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS}.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            return value
        return self._number(key, value, sizes, blocks)

    def _number(self, key: str, value: int, sizes: _Section, blocks: Sequence[int]) -> int:
        if _VOCABULARIES.fullmatch(key):
            return min(value, VOCABULARY)
        if _TOKENS.fullmatch(key):
            return self._token(value)
        if _POSITIONS.fullmatch(key):
            return min(value, POSITIONS)
        if DEPTHS.fullmatch(key):
            return min(value, len(blocks))
        if key == "num_kv_shared_layers":
            return len(blocks) if value >= depth_of(sizes.data) else min(value, len(blocks) // 2)
        if sizes.staged:
            if re.fullmatch(r"out_hidden_size|projection_dim", key) and value in _hiddens(self._data):
                return HIDDEN
            return min(value, 64) if key == "image_size" else value
        for pattern, rule in _RULES:
            if pattern.fullmatch(key):
                return int(rule(value, sizes, self))
        return self._width(key, value, sizes)

    def _width(self, key: str, value: int, sizes: _Section) -> int:
        """A width whose name says nothing: in the same ratio to the hidden width as before, or small."""
        if value < HIDDEN or "kernel" in key:
            return value
        hidden = sizes.hidden
        if value in _hiddens(self._data):
            return HIDDEN
        for other in (hidden, *(s for s in _hiddens(self._data) if s != hidden)):
            if other and value % other == 0 and value // other <= 8:
                return HIDDEN * (value // other)
            if other and value in (other // 2, other // 4):
                return HIDDEN * value // other
        if re.search(r"(size|dim|dims|width|rank|channels?|hidden|inner|proj|ff|features|_input)$", key):
            return min(value, HIDDEN)
        return value

    def _token(self, value: int) -> int:
        """The id of a special token inside the vocabulary; the same for the same token, from the end."""
        if value < VOCABULARY // 2:
            return value
        return self._tokens.setdefault(value, VOCABULARY - 1 - len(self._tokens))

    def _list(self, key: str, value: list[Any], sizes: _Section, blocks: Sequence[int]) -> list[Any]:
        if not value:
            return value
        depth = depth_of(sizes.data)
        if is_indices(key, value, depth):
            where = {old: new for new, old in enumerate(blocks)}
            if all(isinstance(v, int) and v < 0 for v in value):
                return value
            moved = [where[v] for v in value if v in where]
            return moved or [len(blocks) - 1]
        if re.fullmatch(r"\w*feature_layers?", key) and all(isinstance(v, int) and v >= 0 for v in value):
            last = sorted(set(value), reverse=True)  # of another section, which has three blocks or more
            return [max(0, 2 - last.index(v)) for v in value]
        if depth and len(value) == depth:
            return [self._item(key, value[i], sizes, blocks) for i in blocks]
        if _TOKENS.fullmatch(key):
            return [self._token(v) if isinstance(v, int) else v for v in value]
        if re.fullmatch(r"depths|num_block_repeats|stage_num_blocks|n_attn_blocks|stage_numb_of_layers", key):
            return [1 for _ in value]
        if key in ("conv_dim", "tdnn_dim"):
            return [min(v, 32) for v in value]
        if key in ("image_size", "img_size"):
            return [self._number(key, v, sizes, blocks) for v in value]
        return value

    def _item(self, key: str, value: Any, sizes: _Section, blocks: Sequence[int]) -> Any:
        """An entry of a list per block: a number takes the size that a field of one block's name has."""
        if isinstance(value, bool) or not isinstance(value, int) or value <= 1:
            return value
        return self._number(
            re.sub(r"_per_layer$|s$", "", key) if "heads" not in key else "num_attention_heads", value, sizes, blocks
        )


def _hiddens(data: Mapping[str, Any]) -> list[int]:
    """Hidden widths of all nested configs."""
    own = [_first(data, "hidden_size"), _first(data, "d_model"), _first(data, "n_embd"), _first(data, "embed_dim")]
    return [*own, *(h for v in data.values() if isinstance(v, Mapping) for h in _hiddens(v))]


def _sections(widths: Sequence[int], half: int) -> list[int]:
    """Sections of a rotary embedding with `half` in all, in about the same ratio; equal ones stay equal where they can."""
    share = [max(1, n * half // sum(widths)) for n in widths]
    single = next((i for i, n in enumerate(widths) if list(widths).count(n) == 1), 0)
    share[single] += half - sum(share)
    return share


def _kv_heads(value: int, sizes: _Section, _: _Shrink) -> int:
    if value == 1:
        return 1
    return HEADS if value == sizes.heads else KV_HEADS


def _head_dim(value: int, sizes: _Section, shrink: _Shrink) -> int:
    nope, rope = _first(sizes.data, "qk_nope_head_dim"), _first(sizes.data, "qk_rope_head_dim")
    if rope and value == rope:
        return 8
    if rope and nope:
        return 24
    return shrink.head_dim(sizes)


def _patch(value: int, *_: Any) -> int:
    return min(value, 4)


def _image(value: int, sizes: _Section, _: _Shrink) -> int:
    return min(value, 16 if _first(sizes.data, "patch_size") or sizes.data.get("patch_size") else 64)


def _at_most(size: int) -> Any:
    return lambda value, *_: min(value, size)


_RULES: tuple[tuple[re.Pattern[str], Any], ...] = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"n_group|n_groups|num_expert_group|mamba_n_?groups|q_groups|o_groups", _at_most(2)),
        (r"topk_group", _at_most(1)),
        (r"\w*(experts?_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts|num_selected_experts)", _at_most(ACTIVE)),
        (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", _at_most(1)),
        (
            r"n_routed_experts|num_(local_)?experts|moe_num_experts|num_routed_experts|ffn_num_experts",
            _at_most(EXPERTS),
        ),
        (r"zero_expert_num", _at_most(2)),
        (r"linear_num_key_heads|index_n_heads", _at_most(2)),
        (r"linear_(key|value)_head_dim|linear_head_dim", _at_most(HEAD_DIM)),
        (r"\w*(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups|n_kv_heads)", _kv_heads),
        (r"\w*mamba_?(n_|num_)?heads|n_mamba_heads", _at_most(HEADS)),
        (r"mamba_d_ssm", lambda *_: 2 * HIDDEN),
        (r"attn_layer_period|expert_layer_period", _at_most(2)),
        (r"attn_layer_offset|expert_layer_offset", _at_most(1)),
        (r"codebook_size", _at_most(256)),
        (r"mamba_(d_head|head_?dim)", lambda *_: 2 * HIDDEN // HEADS),
        (r"(\w+_)?(num_)?(attention_)?heads|n_heads?|\w*_n_heads", _at_most(HEADS)),
        (r"qk_nope_head_dim|v_head_dim", _at_most(HEAD_DIM)),
        (r"qk_rope_head_dim", _at_most(8)),
        (r"qk_head_dim", lambda value, sizes, _: min(value, 16 if sizes.data.get("qk_rope_head_dim") == 0 else 24)),
        (r"index_head_dim", _at_most(32)),
        (r"index_topk", _at_most(WINDOW)),
        (r"index_kpool", _at_most(WINDOW // 2)),
        (r"base_channels", _at_most(32)),  # of group norms with 32 groups
        (r"rotary_dim", _at_most(8)),
        (r"\w*head_dim|d_kv|kv_channels|d_head|dim_head|\w*head_size", _head_dim),
        (r"query_pre_attn_scalar", lambda value, sizes, shrink: shrink.head_dim(sizes)),
        (r"q_lora_rank", _at_most(32)),
        (r"kv_lora_rank", _at_most(16)),
        (r"\w*(lora_rank|_rank)", _at_most(8)),
        (r"(mamba_)?d_state|\w*state_size", _at_most(HEAD_DIM)),
        (r"time_step_rank|mamba_dt_rank", _at_most(4)),
        (r"\w*moe_\w*intermediate_size|expert_ffn_hidden_size|shared_\w*intermediate_size|expert_dim", _at_most(48)),
        (
            r"\w*(intermediate_size|ffn_dim|ffn_hidden_size|ff_dim|mlp_dim|feed_forward_size)|d_ff|dff|dim_ff|n_inner|d_inner"
            r"|mlp_hidden_size|intermediate_size_mlp",
            _at_most(INNER),
        ),
        (r"hidden_dim", lambda value, sizes, _: HIDDEN if value == sizes.hidden else INNER),
        (r"first_k_dense_replace|num_dense_layers", _at_most(1)),
        (
            r"\w*sliding_window(_size|_len)?|attention_window(_size)?|local_attention|attention_chunk_size",
            _at_most(WINDOW),
        ),
        (r"window_size", _at_most(WINDOW)),
        (r"patch_size", _patch),
        (r"image_size|input_size|resolution|img_size", _image),
        (r"num_patches|num_position_embeddings", _at_most(16)),
        (r"(mamba_)?chunk_size|block_size", _at_most(WINDOW)),
    )
)
