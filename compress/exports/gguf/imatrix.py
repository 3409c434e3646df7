"""imatrix.gguf, llama.cpp's file of the mean squares of each matrix's inputs (tools/imatrix/imatrix.cpp)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import one_line
from compress.exports.base import ExportError

if TYPE_CHECKING:
    import numpy as np

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, slots=True)
class Importance:
    """Sums of squares [E, I] of the inputs of a matrix, and numbers of tokens [E]. E: experts; 1 without."""

    sums: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]


def write_imatrix(path: Path, entries: Mapping[str, Importance], datasets: Iterable[str], chunk: int) -> None:
    """Write an imatrix file.

    Args:
        entries: by the matrix's name in GGUF. datasets: names of the texts. chunk: tokens of a sample.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "imatrix")
    writer.kv_data[0].clear()  # an imatrix has no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(datasets))
    tokens = max((int(entry.counts.max()) for entry in entries.values()), default=0)
    writer.add_uint32("imatrix.chunk_count", -(-tokens // chunk))
    writer.add_uint32("imatrix.chunk_size", chunk)
    for name, entry in sorted(entries.items()):
        writer.add_tensor(name + _SUMS, np.ascontiguousarray(entry.sums, np.float32))
        writer.add_tensor(name + _COUNTS, np.ascontiguousarray(entry.counts, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
