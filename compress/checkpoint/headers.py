"""Safetensors headers, read and written without torch.

A file is the header's length N in 8 little-endian bytes, N bytes of JSON padded with spaces, and the data. Offsets count from
the end of the header. The checks are those of the reference implementation (huggingface/safetensors).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError, one_line
from compress.spec.spec import DTYPE_BITS

#: Longest header in bytes, as in the reference implementation.
MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored array: dtype string, shape, and byte range within the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """Entries by name in order of offset, string metadata, and the offset of the data in the file."""

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Header of a local file. Raises `CheckpointError` with the file and the tensor at fault."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return parse_header(file.read(8), lambda n: file.read(n), size, str(path))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error


def parse_header(prefix: bytes, read: Any, size: int, where: str) -> Header:
    """Header from the first 8 bytes and a function that reads the next n. ``size``: bytes of the file."""
    if size == 0:
        raise CheckpointError("is empty (0 bytes)", where=where, fix="copy or download it again")
    if len(prefix) < 8:
        raise CheckpointError(f"is not a safetensors file: it has only {size} bytes", where=where)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"is not a safetensors file, or is damaged: its header would have {length} bytes", where=where
        )
    if 8 + length > size:
        raise CheckpointError(
            f"is truncated: the header has {length} bytes, the file {size}", where=where, fix="copy it again"
        )
    try:
        data = json.loads(read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"has a damaged header: {one_line(error)}", where=where) from None
    if not isinstance(data, dict):
        raise CheckpointError("has a header that is not a JSON object", where=where)
    metadata = data.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("has metadata values that are not strings", where=where)
    for text in (*data, *metadata, *metadata.values()):
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise CheckpointError(f"has half a surrogate pair, which is not text, in {text[:60]}", where=where)
    entries = {name: _entry(name, value, where) for name, value in data.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_offsets(ordered, size - 8 - length, where)
    return Header(ordered, metadata, 8 + length)


def render_header(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and JSON, padded so that the data begins at a multiple of 8 bytes."""
    data: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        data[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start, entry.end]}
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key `{next(n for n in names if names.count(n) > 1)}` is there twice")
    return data


def _entry(name: str, value: Any, where: str) -> TensorEntry:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        bits = DTYPE_BITS[dtype]
        assert set(value) == {"dtype", "shape", "data_offsets"}
        assert all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (TypeError, KeyError, ValueError, AssertionError):
        dtype = value.get("dtype") if isinstance(value, dict) else None
        if isinstance(dtype, str) and dtype not in DTYPE_BITS:
            raise CheckpointError(f"tensor {name} has the unknown dtype {dtype}", where=where) from None
        raise CheckpointError(f"tensor {name} has a damaged header entry", where=where) from None
    if (end - start) * 8 != prod(shape) * bits:
        raise CheckpointError(
            f"tensor {name} of shape {list(shape)} and dtype {dtype} needs {prod(shape) * bits // 8} bytes, "
            f"its offsets span {end - start}",
            where=where,
        )
    return TensorEntry(dtype, shape, start, end)


def _check_offsets(entries: Mapping[str, TensorEntry], size: int, where: str) -> None:
    position, last = 0, ""
    for name, entry in entries.items():
        if entry.start < position:
            raise CheckpointError(f"tensors {last} and {name} overlap", where=where)
        if entry.start > position:
            raise CheckpointError(f"has a gap of {entry.start - position} bytes before tensor {name}", where=where)
        if entry.end > size:
            missing = entry.end - size
            raise CheckpointError(
                f"is truncated: tensor {name} ends {missing} bytes after the end of the file",
                where=where,
                fix="copy it again",
            )
        position, last = entry.end, name
    if position != size:
        raise CheckpointError(f"has {size - position} bytes after its last tensor", where=where)
