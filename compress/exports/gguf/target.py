"""Exports to GGUF, llama.cpp's format: codes as they are, floats as they are or rounded to one of its types."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.gguf.reader import read_gguf
from compress.errors import CheckpointError
from compress.exports.base import ExportPlan, Target, require
from compress.exports.gguf.layout import FileTensor, GgufFile, gguf_file
from compress.exports.gguf.settings import GgufSettings
from compress.exports.gguf.types import ROUNDED_BY_GGUF
from compress.spec.spec import Spec, Tensor

if TYPE_CHECKING:
    import numpy as np
    import torch

    from compress.checkpoint.values import Checkpoint
    from compress.progress import Progress

#: Values that are rounded at a time.
_AT_ONCE = 1 << 24


class Gguf(Target[GgufSettings]):
    """One file with weights, metadata and tokenizer."""

    name = "gguf"
    summary = "GGUF, for llama.cpp, Ollama, LM Studio: integer codes, mxfp4 and nvfp4 as they are, k-quants by libgguf."
    ending = ".gguf"
    settings = GgufSettings
    packages = ("gguf",)
    extra = "gguf"

    def plan(self, spec: Spec, folder: Path, settings: GgufSettings) -> ExportPlan:
        """The size of the file and its tensors."""
        file = gguf_file(spec, folder, settings)
        _require_rounding(file)
        return file.plan()

    def write(self, checkpoint: Checkpoint, path: Path, settings: GgufSettings, progress: Progress) -> None:
        """Write the file, tensor by tensor, and read it again."""
        assert checkpoint.folder is not None
        file = gguf_file(checkpoint.spec, checkpoint.folder, settings)
        importance = _importance(settings)
        writer = file.writer(path)
        sums = {}
        try:
            for name, values in file.model.factors.items():
                writer.write_tensor_data(_array(values))
                sums[name] = zlib.crc32(_array(values).tobytes())
            for name, sources in file.scales.items():
                data = _array([_overall(checkpoint, source) for source in sources])
                writer.write_tensor_data(data)
                sums[name] = zlib.crc32(data.tobytes())
            with progress.task("write GGUF", len(file.tensors)) as task:
                for tensor in file.tensors:
                    data = _data(checkpoint, tensor, importance.get(tensor.name))
                    assert data.nbytes == tensor.bytes, (tensor, data.shape)
                    writer.write_tensor_data(data)
                    sums[tensor.name] = zlib.crc32(data.tobytes())
                    task.advance(note=tensor.name)
        finally:
            writer.close()
        _check(path, sums)


def _require_rounding(file: GgufFile) -> None:
    """Raise `ExportError` where a type needs libgguf and that is not installed."""
    kinds = {t.chosen.type for t in file.tensors if not t.chosen.coded} - ROUNDED_BY_GGUF
    if kinds:
        require(("libgguf",), "gguf", f"the type {min(kinds)}")


def _array(values: list[float]) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.array(values, np.float32)


def _overall(checkpoint: Checkpoint, tensor: Tensor) -> float:
    """Factor of products with nvfp4 codes: one over what the checkpoint divides their scales by."""
    codes = checkpoint.tensor(tensor.name).codes
    assert codes is not None
    assert codes.overall is not None
    return 1 / float(codes.overall)


def _importance(settings: GgufSettings) -> dict[str, np.ndarray[Any, Any]]:
    """Mean squares of inputs by name in the file."""
    if settings.imatrix is None:
        return {}
    from compress.exports.gguf.imatrix import read_imatrix

    return read_imatrix(Path(settings.imatrix))


def _data(checkpoint: Checkpoint, tensor: FileTensor, importance: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
    """Bytes of a tensor of the file."""
    import numpy as np
    import torch

    from compress.models.loading import values_in

    parts = []
    for number, source in enumerate(tensor.sources):
        if tensor.chosen.coded:
            from compress.exports.gguf.blocks import of_codes

            value = checkpoint.tensor(source.name)
            parts.append(of_codes(value, source, tensor.chosen.type, tensor.place.heads).numpy())
        else:
            weights = None if importance is None else importance[number % len(importance)]
            values = values_in(checkpoint, source, None if source.quant_format is None else torch.float32)
            parts.extend(_rounded(_dense(values, tensor), tensor.chosen.type, weights))
    return np.concatenate(parts) if len(parts) > 1 else np.ascontiguousarray(parts[0])


def _dense(data: torch.Tensor, tensor: FileTensor) -> torch.Tensor:
    """Values in the order of the file."""
    from compress.exports.gguf.blocks import permuted

    place = tensor.place
    data = permuted(data.T if place.transposed else data, place.heads)
    return data.float() + 1 if place.raised else data


def _rounded(data: torch.Tensor, kind: str, importance: np.ndarray[Any, Any] | None) -> Iterator[np.ndarray[Any, Any]]:
    """Bytes of values in a type, some rows at a time."""
    import torch
    from gguf import GGMLQuantizationType, quants

    if kind in ("F32", "F16", "BF16"):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        yield data.to(dtype).contiguous().flatten().view(torch.uint8).numpy()
        return
    for rows in torch.split(data, max(1, _AT_ONCE // data.shape[-1])):
        values = rows.float().contiguous().numpy()
        if kind in ROUNDED_BY_GGUF:
            yield quants.quantize(values, GGMLQuantizationType[kind])
        else:
            import libgguf

            yield libgguf.quantize_rows(values, libgguf.GGMLQuantizationType[kind], imatrix=importance)


def _check(path: Path, sums: dict[str, int]) -> None:
    """Read the file and compare. Raises `CheckpointError` where the disk gives other bytes."""
    header = read_gguf(path)
    with path.open("rb") as file:
        for name, expected in sums.items():
            place = header.tensors[name]
            file.seek(place.start)
            if zlib.crc32(file.read(place.end - place.start)) != expected:
                raise CheckpointError(f"tensor {name} is not what was written", where=str(path), fix="check the disk")
