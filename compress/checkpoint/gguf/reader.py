"""Headers of GGUF files, read without torch: metadata, and the tensors' types, shapes and places. Every count is checked.

A file is ``GGUF``, a version, the counts of tensors and of metadata, the metadata, the table of tensors, and the data, which
begins at a multiple of ``general.alignment``. Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from compress.checkpoint.dequantize.ggml import OTHERS, TYPES, GgmlType
from compress.errors import CheckpointError

_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32
_MOST_AXES, _LONGEST = 4, 1 << 26
#: Number of a metadata type ▶ its `struct` format.
_NUMBERS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: shape in torch's order, type, and byte range within the file."""

    shape: tuple[int, ...]
    kind: GgmlType
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata by key (an array of texts as its length), tensors by name in file order, and the bytes of the file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    size: int


def read_gguf(path: Path) -> GgufHeader:
    """Header of a GGUF file. Raises `CheckpointError` for a damaged or unsupported one."""
    try:
        with path.open("rb") as file:
            return _Reader(file, os.fstat(file.fileno()).st_size, str(path)).header()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error


class _Reader:
    """Reads a file from its beginning."""

    def __init__(self, file: BinaryIO, size: int, where: str) -> None:
        self._file, self._size, self._where, self._place = file, size, where, 0

    def header(self) -> GgufHeader:
        """The header, checked."""
        if self._bytes(4) != _MAGIC:
            raise self._error("is not a GGUF file: it does not begin with GGUF")
        if (version := self._number("I")) not in _VERSIONS:
            raise self._error(f"is GGUF of version {version}; versions 2 and 3 are read", "convert it again")
        tensors, pairs = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._text()
            if key in metadata:
                raise self._error(f"has the metadata {key[:60]} twice")
            metadata[key] = self._value(self._number("I"))
        if (parts := metadata.get("split.count", 1)) != 1:
            raise self._error(
                f"is one of {parts} parts of a model", "join them with `llama-gguf-split --merge`, and name the result"
            )
        rows = [self._row() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise self._error(f"has the alignment {alignment!r}")
        begin = -(-self._place // alignment) * alignment
        return GgufHeader(metadata, self._tensors(rows, begin), self._size)

    def _tensors(
        self, rows: list[tuple[str, tuple[int, ...], GgmlType, int, int]], begin: int
    ) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        last, end = "", begin
        for name, shape, kind, offset, size in sorted(rows, key=lambda row: row[3]):
            start = begin + offset
            if name in tensors:
                raise self._error(f"has the tensor {name} twice")
            if start < end:
                raise self._error(f"has the tensors {last} and {name} in one place")
            if start + size > self._size:
                raise self._error(
                    f"is truncated: tensor {name} ends {start + size - self._size} bytes after the end", "copy it again"
                )
            tensors[name], last, end = GgufTensor(shape, kind, start, start + size), name, start + size
        return tensors

    def _row(self) -> tuple[str, tuple[int, ...], GgmlType, int, int]:
        """Name, shape, type, offset and bytes of a tensor."""
        name, axes = self._text(), self._number("I")
        if not 0 < axes <= _MOST_AXES:
            raise self._error(f"has a tensor {name[:60]} with {axes} axes")
        shape = tuple(reversed([self._number("Q") for _ in range(axes)]))
        number, offset = self._number("I"), self._number("Q")
        if (kind := TYPES.get(number)) is None:
            known = ", ".join(t.name for t in TYPES.values())
            raise self._error(
                f"stores {name[:60]} as {OTHERS.get(number, f'type {number}')}, which this version cannot read",
                f"it reads {known}; start from one of these",
            )
        if shape[-1] % kind.values or not all(shape):
            raise self._error(
                f"stores {name[:60]} {list(shape)} as {kind.name}, whose blocks have {kind.values} values"
            )
        return name, shape, kind, offset, prod(shape) // kind.values * kind.bytes

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise self._error(f"has metadata of the unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in _NUMBERS:
            form = _NUMBERS[inner]
            data = self._bytes(count * struct.calcsize(form))
            return list(struct.unpack(f"<{count}{form}", data))
        if inner != _STRING:
            raise self._error(f"has an array of the type {inner} in its metadata")
        for _ in range(count):  # a vocabulary, of which only the length is needed
            self._bytes(self._number("Q"))
        return count

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(form)))[0]

    def _text(self) -> str:
        try:
            return self._bytes(self._number("Q")).decode()
        except UnicodeDecodeError:
            raise self._error("has a name that is not text") from None

    def _bytes(self, count: int) -> bytes:
        self._place += count
        if self._place > self._size or count > _LONGEST:
            raise self._error("is truncated, or its header is damaged", "copy or download it again")
        return self._file.read(count)

    def _error(self, what: str, fix: str | None = None) -> CheckpointError:
        return CheckpointError(what, where=self._where, fix=fix)
