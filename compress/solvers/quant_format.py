"""Scales and codes of matrices: fitting a grid to weights, rounding to it, and back.

Letters: O outputs, I inputs, G groups of inputs that share a scale, S inputs of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from compress.checkpoint.decode import dequantized
from compress.checkpoint.open import Codes
from compress.spec.formats import QuantFormat

#: Shares of the largest weight that the range of a group may end at.
_SHRINK = torch.linspace(1.0, 0.45, 12).tolist()
#: Weights rounded at a time.
_AT_ONCE = 1 << 19
#: Rounds of least squares for the scale, given the codes.
_REFITS = 3


class Scales(NamedTuple):
    """Scales [O, G] as floats and, for asymmetric grids, whole zero points [O, G] of the same dtype.

    ``overall`` is what nvfp4's stored scales are divided by, float32 [1].
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None
    overall: torch.Tensor | None = None


def code_range(quant_format: QuantFormat) -> tuple[float, float]:
    """Lowest and highest value of a code."""
    if quant_format.is_integer:
        half = 1 << (quant_format.bits - 1)
        return -half, half - 1
    most = 448.0 if quant_format.format == "fp8" else 6.0
    return -most, most


def nearest(t: torch.Tensor, quant_format: QuantFormat) -> torch.Tensor:
    """Values of the nearest codes; ``t``, weights over scales (plus zero points), may be overwritten."""
    low, high = code_range(quant_format)
    if quant_format.is_integer:
        return t.round_().clamp_(low, high)
    t = t.clamp_(low, high)
    if quant_format.format == "fp8":
        return t.to(torch.float8_e4m3fn).to(t.dtype)
    # E2M1: steps of 1/2 up to 2, of 1 up to 4, of 2 up to 6; ties go to the even mantissa, as rounding does
    size = t.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (t / step).round_() * step


def fit(
    W_OI: torch.Tensor,
    quant_format: QuantFormat,
    importance_I: torch.Tensor | None = None,
    keep_OI: torch.Tensor | None = None,
    *,
    search: bool = True,
) -> Scales:
    """Scales (and zero points) that make the rounding error Σ h_i (w - w')² of each group small.

    The ends of the range are searched between the extremes of a group and 0.45 of them, then scale and codes are fitted to
    each other by least squares in turns. Symmetric integers have one code more on the negative side: the longer tail of a
    group gets it, by a negative scale where that is the positive one.

    Args:
        W_OI: float32 weights, [out, in].
        importance_I: h, such as the diagonal of Σ x xᵀ; None for all alike.
        keep_OI: weights that count; removed ones have a code of their own (zero) in every grid.
        search: without, the range ends at the extremes of each group.

    Source: the search is that of GPTQ's and AWQ's codes, weighted by the diagonal of the Hessian as in SqueezeLLM (arXiv
    2306.07629).
    """
    outputs, inputs = W_OI.shape
    size = quant_format.group or inputs
    W = W_OI.float().reshape(outputs, inputs // size, size)
    h = torch.ones(inputs, device=W.device) if importance_I is None else importance_I.float()
    h = (h / h.mean().clamp(min=1e-30) + 1e-6).reshape(1, inputs // size, size)
    if keep_OI is not None:
        keep = keep_OI.reshape(W.shape)
        h = h * keep
        W = W * keep
    low, high = code_range(quant_format)
    least, most = W.amin(2), W.amax(2)
    top = torch.maximum(-least, most).clamp(min=1e-12)
    # nvfp4: the largest scale is the largest of E4M3
    overall = (448.0 * 6.0 / top.max()).reshape(1) if quant_format.format == "nvfp4" else None
    shares = _SHRINK if search else [1.0]
    starts: list[tuple[torch.Tensor, torch.Tensor | None]]
    if quant_format.symmetric:
        ends = torch.where(most > -least, -top, top) if quant_format.is_integer else top
        starts = [(_stored(share * ends / -low, quant_format, overall), None) for share in shares]
    else:
        least, most = least.clamp(max=0), most.clamp(min=0)
        starts = []
        for share in shares:
            scale = ((most - least) * share / (high - low)).clamp(min=1e-12)
            starts.append((scale, (low - least * share / scale).round().clamp(low, high)))
    scale, zero = starts[0]
    if not search:
        return Scales(scale, zero, overall)
    lowest = _error(W, h, scale, zero, quant_format)
    for other, other_zero in starts[1:]:
        error = _error(W, h, other, other_zero, quant_format)
        better = error < lowest
        lowest, scale = torch.where(better, error, lowest), torch.where(better, other, scale)
        if zero is not None and other_zero is not None:
            zero = torch.where(better, other_zero, zero)
    for _ in range(_REFITS):
        q = _values(W, scale, zero, quant_format)
        refit = _stored((h * W * q).sum(2) / (h * q * q).sum(2).clamp(min=1e-30), quant_format, overall)
        refit = torch.where(refit.abs() < 1e-12, scale, refit)
        error = _error(W, h, refit, zero, quant_format)
        better = error < lowest
        lowest, scale = torch.where(better, error, lowest), torch.where(better, refit, scale)
    return Scales(scale, zero, overall)


def _stored(scale: torch.Tensor, quant_format: QuantFormat, overall: torch.Tensor | None) -> torch.Tensor:
    """The nearest scale that the format can store."""
    if quant_format.format == "mxfp4":
        return torch.exp2(torch.log2(scale.abs().clamp(min=1e-30)).round().clamp(-127, 127))
    if overall is not None:
        return (scale.abs() * overall).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float() / overall
    return scale


def codes_near(
    W: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, quant_format: QuantFormat
) -> torch.Tensor:
    """Values of the codes nearest to weights, less zero points; ``scale`` and ``zero`` broadcast to W."""
    if zero is None:
        return nearest(W / scale, quant_format)
    return nearest(W / scale + zero, quant_format).sub_(zero)


def _values(W: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, quant_format: QuantFormat) -> torch.Tensor:
    """Values of codes less zero points, [O, G, S]."""
    return codes_near(W, scale[..., None], None if zero is None else zero[..., None], quant_format)


def _error(
    W: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, quant_format: QuantFormat
) -> torch.Tensor:
    q = _values(W, scale, zero, quant_format)
    return (q.mul_(scale[..., None]).sub_(W).square_().mul_(h)).sum(2)


def integer_codes(
    W_OI: torch.Tensor, quant_format: QuantFormat, scales: Scales, keep_OI: torch.Tensor | None = None
) -> torch.Tensor:
    """Values of the nearest codes, less zero points, of weights [O, I]; 0 for removed ones."""
    scale = scales.scale
    q = _values(W_OI.float().reshape(len(W_OI), scale.shape[1], -1), scale, scales.zero, quant_format).view(W_OI.shape)
    return q if keep_OI is None else q.masked_fill(~keep_OI, 0)


def scaled(code_OI: torch.Tensor, scale_OG: torch.Tensor) -> torch.Tensor:
    """Weights [O, I] of values of codes less zero points."""
    return (code_OI.view(len(code_OI), scale_OG.shape[1], -1) * scale_OG[..., None]).view_as(code_OI)


def to_codes(
    W_OI: torch.Tensor,
    quant_format: QuantFormat,
    scales: Scales,
    dtype: torch.dtype,
    keep_OI: torch.Tensor | None = None,
) -> Codes:
    """The nearest codes of weights [O, I], as files store them, with scales in ``dtype``; of removed weights those of zero."""
    scale = scales.scale
    q = integer_codes(W_OI, quant_format, scales, keep_OI).view(W_OI.shape[0], scale.shape[1], -1)
    if scales.zero is not None:
        q = q + scales.zero[..., None]
    q = q.reshape(W_OI.shape)
    if quant_format.is_integer:
        zero = None if scales.zero is None else scales.zero.to(torch.int8)
        return Codes(q.to(torch.int8), scale.to(dtype), zero)
    if quant_format.format == "fp8":
        return Codes(q.to(torch.float8_e4m3fn), scale.to(dtype))
    size = (2 * q.abs()).to(torch.uint8)  # 0 1 2 3 4 6 8 12 ▶ 0 … 7
    q = (
        torch.where(size < 5, size, torch.where(size == 6, 5, torch.where(size == 8, 6, 7)))
        | (q < 0).to(torch.uint8) * 8
    )
    if scales.overall is None:
        return Codes(q.to(torch.uint8), (torch.log2(scale).round() + 127).to(torch.uint8))
    stored = (scale * scales.overall).to(torch.float8_e4m3fn)
    return Codes(q.to(torch.uint8), stored, None, scales.overall.float())


def rounded(
    W_OI: torch.Tensor,
    quant_format: QuantFormat,
    dtype: torch.dtype,
    keep_OI: torch.Tensor | None = None,
    *,
    search: bool,
) -> Codes:
    """Codes of weights [O, I] of any float dtype by themselves: `fit`, and `to_codes`.

    Some outputs at a time, so that what is computed on the way stays in the caches; nvfp4 has one scale for all of them.
    """
    rows = len(W_OI) if quant_format.format == "nvfp4" else max(1, _AT_ONCE // W_OI.shape[1])
    parts: list[Codes] = []
    for start in range(0, len(W_OI), rows):
        W = W_OI[start : start + rows].float().contiguous()
        keep = None if keep_OI is None else keep_OI[start : start + rows]
        parts.append(to_codes(W, quant_format, fit(W, quant_format, None, keep, search=search), dtype, keep))
    zeros = [part.zero for part in parts if part.zero is not None]
    return Codes(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
        parts[0].overall,
    )


def dequantize(codes: Codes, keep_OI: torch.Tensor | None = None) -> torch.Tensor:
    """The weights [O, I] that a loader makes of codes, in the dtype of the scales; removed ones are +0."""
    values = dequantized(codes.codes, codes.scale, codes.zero, codes.overall)
    return values if keep_OI is None else values.masked_fill(~keep_OI, 0)
