"""Bytes that decoding caches, by length of the text, read off headers alone.

Each block caches parts, such as the keys and values of heads that see the same tokens. A part has a number of values per
token, and the largest number of tokens that it keeps. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from compress.architectures.model_map import model_map
from compress.architectures.record import Architecture
from compress.errors import ReportError
from compress.spec.edits import EDIT_KINDS
from compress.spec.spec import DTYPE_BITS, FLOAT_DTYPES, Spec


@dataclass(frozen=True, slots=True)
class Cached:
    """A part of a block's cache.

    Attributes:
        values: numbers cached per token.
        tokens: most tokens kept; None for all of them; or a function from the length of the text.
    """

    values: int
    tokens: int | Callable[[int], int] | None = None

    def count(self, length: int) -> int:
        """Numbers cached after ``length`` tokens."""
        if callable(self.tokens):
            return self.values * self.tokens(length)
        return self.values * (length if self.tokens is None else min(length, self.tokens))


def _keys_and_values(record: Architecture, config: Mapping[str, Any]) -> int:
    return 2 * record.kv_heads(config) * record.head_dim(config)


def _latent(record: Architecture, config: Mapping[str, Any]) -> int:
    return sum(int(config.get(key) or default) for key, default in record.latent.items())


#: `Architecture.cache` of a family ▶ numbers that a block caches per token.
VALUES: Mapping[str, Callable[[Architecture, Mapping[str, Any]], int]] = {
    "keys and values": _keys_and_values,
    "latent": _latent,
}
#: Parts of the cache of each block, by its number.
Caches: TypeAlias = tuple[tuple[Cached, ...], ...]


def caches(spec: Spec) -> Caches | None:
    """The parts that each block caches. None where the model does not decode, or its cache is not known.

    Blocks that share their weights have a cache each, as they read other inputs. A stock window of w tokens leaves w - 1 in
    the cache: the token itself comes with the next step (``DynamicSlidingWindowLayer`` of transformers 5).
    """
    mapped = model_map(spec)
    if not mapped.known or not mapped.record.causal or mapped.record.cache not in VALUES:
        return None
    kinds = mapped.per_layer.get("layer_types") or mapped.config.get("layer_types")
    window, depth = mapped.record.window(mapped.config), mapped.depth
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * depth
    values = VALUES[mapped.record.cache](mapped.record, mapped.config)
    limits = {
        "full_attention": None,
        "sliding_attention": window,
        "chunked_attention": mapped.config.get("attention_chunk_size"),
    }
    if not isinstance(kinds, list) or len(kinds) != depth or any(str(kind) not in limits for kind in kinds):
        return None
    if any(not isinstance(limits[kind], int | None) for kind in kinds):
        return None
    # a window of one token slices [-0:], which keeps all
    parts: list[tuple[Cached, ...]] = [(Cached(values, max(limits[kind] or 1, 1) - 1 or None),) for kind in kinds]
    for edit in spec.structure.edits:
        block = mapped.block_of(f"{edit.module}.weight")
        if block is not None and block < depth:
            cached = EDIT_KINDS[edit.kind].cached(edit, [(part.values, part.tokens) for part in parts[block]])
            parts[block] = tuple(Cached(*part) for part in cached)
    return tuple(parts)


def cache_values(spec: Spec, length: int) -> int | None:
    """Numbers cached after ``length`` tokens of one text; None where the cache is not known."""
    parts = caches(spec)
    return None if parts is None else sum(part.count(length) for block in parts for part in block)


def cache_bytes(spec: Spec, length: int, dtype: str | None = None) -> int | None:
    """Bytes cached after ``length`` tokens of one text; None where the cache is not known.

    Args:
        dtype: format of the cached numbers, as configs name it. By default the one that the config asks for: 8 bits for a
            quantised cache, else its dtype.
    """
    values = cache_values(spec, length)
    return None if values is None else values * _bits(spec, dtype) // 8


@dataclass(frozen=True, slots=True)
class CachedBytes:
    """The parts of all blocks' caches that keep the same tokens.

    Attributes:
        tokens: most tokens kept; None for all of them, and for patterns.
        kept: (length of text, tokens kept) of a pattern, at the lengths that reports know; None for others.
    """

    bytes_per_token: int
    tokens: int | None
    kept: list[list[int]] | None = None


#: Lengths at which reports know the cache of a pattern, such as every l-th token: powers of two, and the trained positions.
_PATTERN_LENGTHS = tuple(1 << power for power in range(4, 21))


def cached_bytes(spec: Spec) -> list[CachedBytes] | None:
    """The cache in the format that the config asks for, by tokens kept, all of them first; None where it is not known."""
    parts = caches(spec)
    if parts is None:
        return None
    positions = model_map(spec).trained_positions
    lengths = tuple(sorted({*_PATTERN_LENGTHS, *([] if positions is None else [positions])}))
    values: dict[tuple[int | None, tuple[tuple[int, int], ...] | None], int] = {}
    for part in (part for block in parts for part in block):
        key = _kept(part.tokens, lengths)
        values[key] = values.get(key, 0) + part.values
    order = sorted(values, key=lambda key: (key[0] is not None, -(key[0] or 0)))
    return [
        CachedBytes(values[tokens, kept] * _bits(spec, None) // 8, tokens, [*map(list, kept)] if kept else None)
        for tokens, kept in order
    ]


def _kept(
    tokens: int | Callable[[int], int] | None, lengths: Sequence[int]
) -> tuple[int | None, tuple[tuple[int, int], ...] | None]:
    """`CachedBytes.tokens` and `CachedBytes.kept` of a part."""
    if not callable(tokens):
        return tokens, None
    most = tokens(lengths[-1])
    if all(tokens(length) == min(length, most) for length in (*lengths, 1, most - 1, most, most + 1, 2 * most + 1)):
        return most, None  # a window, with or without first tokens
    return None, tuple((length, tokens(length)) for length in lengths)


def bytes_at(parts: Sequence[Mapping[str, Any]], length: int) -> int:
    """Bytes cached after ``length`` tokens, by the parts of a report: mappings with the fields of `CachedBytes`.

    Raises:
        ReportError: a pattern is not known at that length.
    """
    total = 0
    for part in parts:
        kept = dict(part["kept"]) if part.get("kept") else None
        if kept is not None and length not in kept:
            raise ReportError(
                f"the cache of patterns is not known after {length} tokens",
                fix="take a power of two, or the positions that the model was trained for",
            )
        tokens = min(length, part["tokens"] or length) if kept is None else kept[length]
        total += part["bytes_per_token"] * tokens
    return total


def plan_lengths(positions: int | None) -> tuple[int, ...]:
    """Lengths at which plans show the cache: 512 and every fourfold, up to the trained positions; these last."""
    last = positions or 8192
    lengths = [length for length in (512, 2048, 8192, 32768, 131072) if length < last]
    return (*lengths, last)


def kv_bytes_per_token(spec: Spec) -> int | None:
    """Bytes cached per token while no window is full, in the format that the config asks for; None without a known cache."""
    parts = caches(spec)
    return None if parts is None else sum(part.values for block in parts for part in block) * _bits(spec, None) // 8


def _bits(spec: Spec, dtype: str | None) -> int:
    if dtype is None and spec.structure.cache_format is not None:
        return 8
    config = spec.structure.config
    name = dtype or str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return next((DTYPE_BITS[k] for k, v in FLOAT_DTYPES.items() if v == name), 32)


def reach(spec: Spec) -> int | None:
    """Most tokens of a text that is read through the cache; None for any number.

    A learned position has a row in a table. Other models read on beyond the positions that they were trained on only where
    every block forgets what is far away: then no distance is larger than in training.
    """
    mapped = model_map(spec)
    if mapped.positions is not None:
        return mapped.positions
    known = spec.structure.config.get("max_position_embeddings")
    parts = caches(spec)
    # a pattern that is counted by the length may keep tokens from anywhere
    forgets = parts is not None and all(isinstance(part.tokens, int) for block in parts for part in block)
    return known if isinstance(known, int) and not forgets else None
