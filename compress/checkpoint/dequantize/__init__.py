"""Checkpoints that other tools have quantised, dequantised on reading, tensor by tensor. A scheme has a file.

A scheme says from headers which logical tensors the arrays store. Their values are computed when a tensor is read, in the
memory of that tensor, so a pass sees a float checkpoint. Nothing here is bundled into compact checkpoints. Importing this
package loads no torch.
"""

from __future__ import annotations

import pkgutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from compress.checkpoint.dequantize.base import SCHEMES, ReadArray, WeightFiles
from compress.checkpoint.headers import TensorEntry
from compress.errors import CheckpointError
from compress.formatting import format_bytes
from compress.spec.spec import FLOAT_DTYPES, Quantized, Tensor, widest

__all__ = ["STALE", "ReadArray", "check_said", "config_of", "knows", "parse", "stored_note"]

#: WeightFiles beside the weights that describe their codes to other tools; they would be wrong beside dequantised weights.
STALE = frozenset({"quantize_config.json", "quant_config.json", "hf_quant_config.json"})

for _info in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_info.name}")


def knows(quantization: Any) -> bool:
    """Whether a ``quantization_config`` is of a scheme that is dequantised on reading."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return isinstance(method, str) and method in SCHEMES


def check_said(names: Iterable[str], where: str) -> None:
    """Check that the arrays of a checkpoint without ``quantization_config`` are no codes. Raises `CheckpointError`."""
    if (
        code := next(
            (name for name in names if name.endswith((".qweight", ".weight_scale_inv", ".absmax", ".SCB"))), None
        )
    ) is not None:
        raise CheckpointError(
            f"has codes ({code}), and config.json has no `quantization_config`",
            where=where,
            fix="add it: older GPTQ and AWQ checkpoints have its fields, but quant_method, in quantize_config.json",
        )


def parse(
    config: Mapping[str, Any], entries: Mapping[str, TensorEntry], read: ReadArray, where: str
) -> tuple[dict[str, Tensor], dict[str, Quantized], set[str], tuple[str, ...]]:
    """Dequantised tensors and their sources by name, names of arrays to leave out, and notes.

    Args:
        config: with a ``quantization_config`` that this package `knows`. read: reads a small array.

    Raises:
        CheckpointError: an unknown variant; arrays that are missing, of the wrong shape or dtype, or that belong to no tensor.
    """
    quantization = config["quantization_config"]
    scheme = SCHEMES[quantization["quant_method"]]
    files = WeightFiles(config, quantization, entries, read, _dtype(config), where)
    scheme.find(files)
    owned = {key for source in files.sources.values() for key in source.arrays.values()}
    left = {key for key in entries.keys() - owned if key.endswith(scheme.unused)}
    for key in entries.keys() - owned - left:
        if key.endswith(scheme.marks) or entries[key].dtype in scheme.coded:
            raise CheckpointError(
                f"has {key} ({entries[key].dtype}), and nothing beside it that tells its values",
                where=where,
                fix="copy or download it again",
            )
    if not files.sources:
        raise CheckpointError(
            f"its config says quant_method {quantization['quant_method']!r}, but no array is stored so",
            where=where,
            fix="if the weights are plain floats, remove `quantization_config` from config.json",
        )
    return files.tensors, files.sources, left, (stored_note(files.tensors, files.sources), *_left(left))


def _dtype(config: Mapping[str, Any]) -> str:
    """Safetensors dtype of dequantised tensors: that of the config, else bfloat16."""
    said = {str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")}
    return next((key for key, name in FLOAT_DTYPES.items() if name in said), "BF16")


def stored_note(tensors: Mapping[str, Tensor], sources: Mapping[str, Quantized]) -> str:
    """Sentence about formats, bytes as stored, and the dtype that the tensors are read in."""
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for source in sources.values():
        sizes[source.format][0] += 1
        sizes[source.format][1] += source.bytes
    dense, dtype = sum(tensors[name].dense_bytes for name in sources), next(tensors[name].dtype for name in sources)
    stored = ", ".join(f"{count} as {said} ({format_bytes(size)})" for said, (count, size) in sizes.items())
    return (
        f"weights are stored small, {stored}, and are read as {FLOAT_DTYPES[dtype]} ({format_bytes(dense)}); "
        "sizes are compared with the files as they are"
    )


def _left(left: Iterable[str]) -> tuple[str, ...]:
    ends = sorted({key.rpartition(".")[2] for key in left})
    return (f"arrays that only runtimes need are left out: {', '.join(ends)}",) if ends else ()


def config_of(config: Mapping[str, Any], tensors: Iterable[Tensor]) -> dict[str, Any]:
    """The config of the dequantised model: without ``quantization_config``, with the dtype of its tensors."""
    floats = sorted({tensor.dtype for tensor in tensors if tensor.dtype in FLOAT_DTYPES})
    result = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    return {**result, "dtype": FLOAT_DTYPES[widest(floats)]} if floats else result
