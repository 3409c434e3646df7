"""One tensor in another format: floats cast, or rounded to the nearest codes. Imports torch."""

from __future__ import annotations

import torch

from compress.checkpoint.storage.reading import as_rows, from_rows
from compress.checkpoint.values import Codes, Value, torch_dtype
from compress.errors import CheckpointError, PassError
from compress.passes.cast.global_scales import GlobalScales
from compress.solvers.quant_format import dequantize, overflowing, rounded
from compress.solvers.trellis import trellis_nearest
from compress.spec.formats import QuantFormat
from compress.spec.spec import Spec, Tensor


def convert(name: str, value: Value, before: Spec, after: Spec, overall: GlobalScales, *, search: bool) -> Value:
    """One tensor in its planned format.

    Args:
        overall: scales of nvfp4's scales.
        search: search for the scales of least squared error, in place of those of the largest weight.
    """
    tensor = after.tensors[name]
    target = torch_dtype(tensor.dtype)
    data: torch.Tensor = value.data
    if tensor.quant_format is not None:
        return (
            value if value.codes is not None else _rounded(value, tensor, tensor.quant_format, target, overall, search)
        )
    if data.dtype == target:
        return value
    if tensor.dtype == "F16" and (count := overflowing(data, target)):
        raise PassError(
            f"{count} weights of {name} are beyond the range of fp16 (65504)",
            key="weights",
            fix=f"use bf16, or keep the module: skip: [{before.tensors[name].module}]",
        )
    return Value(data.to(target), value.mask)


def check_finite(name: str, data: torch.Tensor) -> None:
    """Raise `CheckpointError` if a tensor has NaN or infinite values, which have no code."""
    # the extremes are NaN if any value is; faster than a test of every weight
    if data.numel() and not torch.isfinite(torch.stack(torch.aminmax(data))).all():
        raise CheckpointError(f"tensor {name} holds NaN or infinite values, which have no code")


def _rounded(
    value: Value, tensor: Tensor, quant_format: QuantFormat, dtype: torch.dtype, overall: GlobalScales, search: bool
) -> Value:
    """Round to the nearest codes, with scales fitted to the weights alone."""
    check_finite(tensor.name, value.data)
    grid = quant_format.to_json()
    across = as_rows(value.data, grid)
    keep = None if value.mask is None else as_rows(value.mask, grid)
    if quant_format.is_trellis:
        states, scale = trellis_nearest(across.float().contiguous(), quant_format.bits)
        codes = Codes(states, scale.to(dtype))
    else:
        codes = rounded(across, quant_format, dtype, keep, overall.of(tensor.name), search=search)

    def data() -> torch.Tensor:
        return from_rows(dequantize(codes, keep), grid, tensor.shape)

    return Value(data, value.mask, codes)
