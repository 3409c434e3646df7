"""imatrix.gguf, llama.cpp's file of the mean squares of each matrix's inputs (tools/imatrix/imatrix.cpp)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import one_line
from compress.exports.base import ExportError

if TYPE_CHECKING:
    import numpy as np

_SUMS, _COUNTS = ".in_sum2", ".counts"
#: Types of metadata and tensors, and the alignment of data (ggml/include/gguf.h).
_UINT32, _STRING, _ARRAY, _FLOAT32, _ALIGNMENT = 4, 8, 9, 0, 32


@dataclass(frozen=True, slots=True)
class Importance:
    """Sums of squares [E, I] of the inputs of a matrix, and numbers of tokens [E]. E: experts; 1 without."""

    sums: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]


def imatrix_bytes(entries: Mapping[str, Importance], datasets: Iterable[str], chunk: int) -> bytes:
    """The contents of an imatrix file (GGUF version 3, all tensors float32).

    Args:
        entries: by the matrix's name in GGUF. datasets: names of the texts. chunk: tokens of a sample.
    """

    tokens = max((int(entry.counts.max()) for entry in entries.values()), default=0)
    names = [_text(name) for name in datasets]
    metadata = {
        "general.type": struct.pack("<I", _STRING) + _text("imatrix"),
        "imatrix.datasets": struct.pack("<IIQ", _ARRAY, _STRING, len(names)) + b"".join(names),
        "imatrix.chunk_count": struct.pack("<II", _UINT32, -(-tokens // chunk)),
        "imatrix.chunk_size": struct.pack("<II", _UINT32, chunk),
    }
    infos, data = [], bytearray()
    for name, entry in sorted(entries.items()):
        for end, array in ((_SUMS, entry.sums), (_COUNTS, entry.counts.reshape(-1, 1))):
            shape = struct.pack("<I", array.ndim) + struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
            infos.append(_text(name + end) + shape + struct.pack("<IQ", _FLOAT32, len(data)))
            data += _padded(array.astype("<f4").tobytes())
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(infos), len(metadata))
    header += b"".join(_text(key) + value for key, value in metadata.items())
    return _padded(header + b"".join(infos)) + bytes(data)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % _ALIGNMENT)


def read_imatrix(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Mean squares of inputs [E, I] by the matrix's name in GGUF; ones for experts without a token.

    Raises:
        ExportError: the file cannot be read, or is no imatrix in GGUF.
    """
    import gguf
    import numpy as np

    try:
        arrays = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    except Exception as error:  # the library raises what it meets
        raise ExportError(f"is no imatrix in GGUF: {one_line(error)}", where=str(path)) from error
    means = {}
    for name, sums in arrays.items():
        if not name.endswith(_SUMS):
            continue
        counts = arrays.get(name.removesuffix(_SUMS) + _COUNTS)
        if counts is None:
            raise ExportError(f"has no counts of {name.removesuffix(_SUMS)}", where=str(path), fix="make it again")
        count = counts.reshape(-1, 1)
        rows = sums.reshape(len(count), -1)
        means[name.removesuffix(_SUMS)] = np.where(count > 0, rows / np.maximum(count, 1), 1).astype(np.float32)
    if not means:
        raise ExportError("is no imatrix in GGUF: it has no sums of squares", where=str(path))
    return means
