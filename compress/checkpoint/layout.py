"""Exact layout of weight files: shards, headers, offsets, index. Planner and writer share it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from compress.checkpoint.headers import TensorEntry, render_header
from compress.checkpoint.storage import StoredPart, parts
from compress.spec.spec import DENSE, DTYPE_BITS, Spec, Tensor

#: The type `bytes`, whose name is a property here.
Buffer: TypeAlias = bytes
#: Safetensors metadata key whose JSON value describes the stored tensors; docs/format.md specifies it.
METADATA_KEY = "compress.tensors"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file: its tensors in writing order, its array entries and its rendered header."""

    file: str
    tensors: tuple[Tensor, ...]
    entries: Mapping[str, TensorEntry]
    header: bytes

    @property
    def bytes(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + sum(e.end - e.start for e in self.entries.values())


@dataclass(frozen=True, slots=True)
class Layout:
    """All weight files of a checkpoint."""

    shards: tuple[Shard, ...]

    @property
    def bytes(self) -> int:
        """Size of all weight files in bytes, without the index."""
        return sum(shard.bytes for shard in self.shards)

    def index(self) -> Buffer | None:
        """Contents of the index file; None for a single weight file."""
        if len(self.shards) == 1:
            return None
        names = {key: shard.file for shard in self.shards for key in shard.entries}
        total = sum(e.end - e.start for shard in self.shards for e in shard.entries.values())
        data = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        return (json.dumps(data, indent=2) + "\n").encode()


def lay_out(spec: Spec, max_shard: int, metadata: Mapping[str, str] | None = None) -> Layout:
    """Layout with shards of up to ``max_shard`` bytes of data; a larger tensor gets its own shard.

    Tensors are in natural order of their names, so the same tensors give the same bytes whatever the input's order was.
    Within a shard, arrays with wider elements come first. That aligns each array in the file, which memory-mapping readers
    need; the reference writer does the same.
    """
    groups: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in sorted(spec.stored(), key=lambda t: natural(t.name)):
        size = sum(part.bytes for part in parts(tensor))
        if groups[-1] and filled + size > max_shard:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    shards = []
    for number, group in enumerate(groups, 1):
        file = SINGLE_NAME if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        pieces = sorted((part for tensor in group for part in parts(tensor)), key=_alignment)
        entries, position = {}, 0
        for piece in pieces:
            entries[piece.key] = TensorEntry(piece.dtype, piece.shape, position, position + piece.bytes)
            position += piece.bytes
        shards.append(Shard(file, tuple(group), entries, render_header(entries, _metadata(group, metadata))))
    return Layout(tuple(shards))


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that compares numbers in names by value: block 2 comes before block 10."""
    return [_key(part) for part in re.split(r"([0-9]+)", name)]


def _key(part: str) -> tuple[bool, int, str]:
    """Numbers compare by length, then by digits: Python refuses to parse integers of several thousand digits."""
    if not (part.isascii() and part.isdigit()):
        return False, 0, part
    digits = part.lstrip("0")
    return True, len(digits), f"{digits} {part}"


def _alignment(part: StoredPart) -> int:
    return -DTYPE_BITS[part.dtype]


def _metadata(tensors: list[Tensor], metadata: Mapping[str, str] | None) -> dict[str, str]:
    """``format: pt``, which transformers requires, the input's own metadata, and the table of stored tensors if any."""
    table: dict[str, dict[str, Any]] = {
        t.name: {"storage": list(t.storage), "shape": list(t.shape), "kept": t.kept}
        | ({} if t.quant_format is None else {"grid": t.quant_format.to_json(), "dtype": t.dtype})
        for t in tensors
        if t.storage != DENSE or t.kept is not None
    }
    result = {"format": "pt", **(metadata or {})}
    result.pop(METADATA_KEY, None)
    if table:
        result[METADATA_KEY] = json.dumps(table, separators=(",", ":"), sort_keys=True)
    return result
