"""Scales and codes of matrices: fit scales to weights, quantise, dequantise.

Letters: O outputs, I inputs, G groups of inputs that share a scale, S inputs of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from compress.checkpoint.storage.reading import dequantized
from compress.checkpoint.values import Codes
from compress.spec.formats import QuantFormat

#: Formats whose codes are E4M3.
_E4M3 = ("fp8", "mxfp8")
#: Ends of a group's range to try, as shares of its largest weight.
_SHRINK = torch.linspace(1.0, 0.45, 12).tolist()
#: Weights quantised at a time.
_AT_ONCE = 1 << 19
#: Rounds of least squares for the scale, given the codes.
_REFITS = 3
#: Weights that scales are searched for at a time on a CPU, few enough for its caches.
_IN_CACHE = 1 << 16


class Scales(NamedTuple):
    """Scales [O, G] as floats and, for asymmetric formats, integer-valued zero points [O, G] of the same dtype.

    Outputs that share a scale each have it here.
    ``overall`` is the scale of nvfp4's scales, float32 [1]: the stored scales are divided by it.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None
    overall: torch.Tensor | None = None


def code_range(quant_format: QuantFormat) -> tuple[float, float]:
    """Return the lowest and the highest value of a code."""
    if quant_format.is_integer:
        half = 1 << (quant_format.bits - 1)
        return -half, half - 1
    most = 448.0 if quant_format.format in _E4M3 else 6.0
    return -most, most


def nearest(t: torch.Tensor, quant_format: QuantFormat) -> torch.Tensor:
    """Return the values of the nearest codes, of the shape of ``t``: weights over scales, plus zero points.

    ``t`` may be overwritten. Ties go to the even code.
    """
    low, high = code_range(quant_format)
    if quant_format.is_integer:
        return t.round_().clamp_(low, high)
    t = t.clamp_(low, high)
    if quant_format.format in _E4M3:
        return _nearest_e4m3(t)
    # E2M1: steps of 1/2 up to 2, of 1 up to 4, of 2 up to 6; ties go to the even mantissa, as rounding does
    size = t.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (t / step).round_() * step


def _nearest_e4m3(t: torch.Tensor) -> torch.Tensor:
    """Return the nearest values of E4M3 to ones of its range."""
    if t.device.type != "cpu" or t.dtype != torch.float32:
        return t.to(torch.float8_e4m3fn).to(t.dtype)
    # torch decodes E4M3 slowly on a CPU: a value has three bits behind its first one, the last of 2^-9 at least
    power = (t.view(torch.int32) & 0x7F800000).view(torch.float32)
    step = power.clamp_(min=2.0**-6).mul_(2.0**-3)
    return (t / step).round_().mul_(step)


def fit(
    W_OI: torch.Tensor,
    quant_format: QuantFormat,
    importance_I: torch.Tensor | None = None,
    keep_OI: torch.Tensor | None = None,
    overall: torch.Tensor | None = None,
    *,
    search: bool = True,
) -> Scales:
    """Return scales [O, G] (and zero points) with a small rounding error Σ h_i (w - w')² in each group.

    Twelve ends of the range are tried, from the extremes of a group to 0.45 of them. Then codes and scale alternate three
    times: nearest codes q, and s = Σ h w q / Σ h q². A step counts only if it lowers the error. Symmetric integers have one
    code more on the negative side. The longer tail of a group gets it: the scale is negative if that is the positive tail.

    Args:
        W_OI: weights, [out, in], float32.
        quant_format: the format; its group size divides the inputs.
        importance_I: h [in], such as the diagonal of Σ x xᵀ; None for equal weights.
        keep_OI: keep-mask; removed weights do not count, since every format has the code zero.
        overall: the scale of nvfp4's scales, float32 [1]; None for that of these weights (`global_scale`).
        search: if false, the range ends at the extremes of each group, and nothing is fitted.

    Source: the search of the code of GPTQ and AWQ, weighted by the Hessian's diagonal as in SqueezeLLM (arXiv 2306.07629).
    """
    outputs, inputs = W_OI.shape
    if (height := quant_format.height(outputs)) > 1:
        return _fit_blocks(W_OI, quant_format, importance_I, keep_OI, height, search=search)
    size = quant_format.group or inputs
    W = W_OI.float().reshape(outputs, inputs // size, size)
    h = torch.ones(inputs, device=W.device) if importance_I is None else importance_I.float()
    h = (h / h.mean().clamp(min=1e-30) + 1e-6).reshape(1, inputs // size, size)
    if keep_OI is not None:
        keep = keep_OI.reshape(W.shape)
        h = h * keep
        W = W * keep
    starts, overall = _from_extremes(W, quant_format, _SHRINK if search else [1.0], overall)
    if not search:
        return Scales(*starts[0], overall)
    rows = outputs if W.is_cuda else max(1, _IN_CACHE // inputs)
    parts = [slice(start, start + rows) for start in range(0, outputs, rows)]
    best = [
        _searched(
            W[part],
            h[part] if keep_OI is not None else h,
            [(scale[part], None if zero is None else zero[part]) for scale, zero in starts],
            quant_format,
            overall,
        )
        for part in parts
    ]
    zero = None if starts[0][1] is None else torch.cat([one for _, one in best if one is not None])
    return Scales(torch.cat([scale for scale, _ in best]), zero, overall)


def _fit_blocks(
    W_OI: torch.Tensor,
    quant_format: QuantFormat,
    importance_I: torch.Tensor | None,
    keep_OI: torch.Tensor | None,
    height: int,
    *,
    search: bool,
) -> Scales:
    """`fit` where ``height`` outputs share their scales: the weights of a block are those of one group of one output."""
    outputs, inputs = W_OI.shape
    size = quant_format.group or inputs

    def flat(t_OI: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(t_OI, (0, 0, 0, -outputs % height))
        return padded.reshape(-1, height, inputs // size, size).transpose(1, 2).flatten(1)

    importance = None if importance_I is None else flat(importance_I[None].expand(height, -1))[0]
    keep = None if keep_OI is None else flat(keep_OI)
    single = replace(quant_format, group=height * size, block=False, whole=False)
    scales = fit(flat(W_OI), single, importance, keep, search=search)
    return scales._replace(scale=scales.scale.repeat_interleave(height, 0)[:outputs])


def _searched(
    W: torch.Tensor,
    h: torch.Tensor,
    starts: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    quant_format: QuantFormat,
    overall: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the best of scales and zero points [O, G], fitted to weights [O, G, S]; h broadcasts to these."""
    scale, zero = starts[0]
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
    return scale, zero


def _from_extremes(
    W: torch.Tensor, quant_format: QuantFormat, shares: Sequence[float], overall: torch.Tensor | None
) -> tuple[list[tuple[torch.Tensor, torch.Tensor | None]], torch.Tensor | None]:
    """Return scales and zero points [O, G] for each end of the range, and the scale of nvfp4's scales.

    Args:
        W: weights, [O, G, S]. shares: ends of the range, as shares of each group's extremes. overall: as in `fit`.
    """
    low, high = code_range(quant_format)
    least, most = W.amin(2), W.amax(2)
    top = torch.maximum(-least, most).clamp(min=1e-12)
    if quant_format.format == "nvfp4":
        overall = global_scale(float(top.max())).to(W.device) if overall is None else overall.to(W.device)
    if quant_format.symmetric:
        ends = torch.where(most > -least, -top, top) if quant_format.is_integer else top
        return [(_stored(share * ends / -low, quant_format, overall), None) for share in shares], overall
    least, most = least.clamp(max=0), most.clamp(min=0)
    starts: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for share in shares:
        scale = ((most - least) * share / (high - low)).clamp(min=1e-12)
        starts.append((scale, (low - least * share / scale).round().clamp(low, high)))
    return starts, overall


def global_scale(largest: float) -> torch.Tensor:
    """Return the scale of nvfp4's scales, float32 [1], with which that of the largest weight is the largest value of E4M3."""
    return torch.tensor([448.0 * 6.0 / max(largest, 1e-12)])


def _stored(scale: torch.Tensor, quant_format: QuantFormat, overall: torch.Tensor | None) -> torch.Tensor:
    """Return the nearest scale that the format can store."""
    if quant_format.format.startswith("mx"):
        return torch.exp2(torch.log2(scale.abs().clamp(min=1e-30)).round().clamp(-127, 127))
    if overall is not None:
        return (scale.abs() * overall).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float() / overall
    return scale


def codes_near(
    W: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, quant_format: QuantFormat
) -> torch.Tensor:
    """Return the nearest codes to weights, less zero points, in W's shape; ``scale`` and ``zero`` broadcast to it."""
    if zero is None:
        return nearest(W / scale, quant_format)
    return nearest(W / scale + zero, quant_format).sub_(zero)


def _values(W: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, quant_format: QuantFormat) -> torch.Tensor:
    """Return the nearest codes less zero points, [O, G, S]."""
    return codes_near(W, scale[..., None], None if zero is None else zero[..., None], quant_format)


def _error(
    W: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, quant_format: QuantFormat
) -> torch.Tensor:
    q = _values(W, scale, zero, quant_format)
    return (q.mul_(scale[..., None]).sub_(W).square_().mul_(h)).sum(2)


def integer_codes(
    W_OI: torch.Tensor, quant_format: QuantFormat, scales: Scales, keep_OI: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the nearest codes less zero points of weights [O, I], float32; 0 for removed weights."""
    scale = scales.scale
    q = _values(W_OI.float().reshape(len(W_OI), scale.shape[1], -1), scale, scales.zero, quant_format).view(W_OI.shape)
    return q if keep_OI is None else q.masked_fill(~keep_OI, 0)


def scaled(code_OI: torch.Tensor, scale_OG: torch.Tensor) -> torch.Tensor:
    """Return the weights [O, I] of codes less zero points: codes times scales."""
    return (code_OI.view(len(code_OI), scale_OG.shape[1], -1) * scale_OG[..., None]).view_as(code_OI)


def to_codes(
    W_OI: torch.Tensor,
    quant_format: QuantFormat,
    scales: Scales,
    dtype: torch.dtype,
    keep_OI: torch.Tensor | None = None,
) -> Codes:
    """Return the nearest codes of weights [O, I], as files store them, with scales in ``dtype``; one for outputs that share it.

    Removed weights get the code of zero.
    """
    scale = scales.scale
    if quant_format.format in _E4M3:
        low, high = code_range(quant_format)
        t = (W_OI.float().view(len(W_OI), scale.shape[1], -1) / scale[..., None]).clamp_(low, high).view(W_OI.shape)
        codes = (t if keep_OI is None else t.masked_fill_(~keep_OI, 0)).to(torch.float8_e4m3fn)
        is_exponent = quant_format.format == "mxfp8"
        return Codes(codes, _exponents(scale) if is_exponent else scale[:: quant_format.height(len(codes))].to(dtype))
    q = integer_codes(W_OI, quant_format, scales, keep_OI).view(W_OI.shape[0], scale.shape[1], -1)
    if scales.zero is not None:
        q = q + scales.zero[..., None]
    q = q.reshape(W_OI.shape)
    if quant_format.is_integer:
        zero = None if scales.zero is None else scales.zero.to(torch.int8)
        return Codes(q.to(torch.int8), scale[:: quant_format.height(len(q))].to(dtype), zero)
    size = (2 * q.abs()).to(torch.uint8)  # 0 1 2 3 4 6 8 12 ▶ 0 … 7
    q = (
        torch.where(size < 5, size, torch.where(size == 6, 5, torch.where(size == 8, 6, 7)))
        | (q < 0).to(torch.uint8) * 8
    )
    if scales.overall is None:
        return Codes(q.to(torch.uint8), _exponents(scale))
    stored = (scale * scales.overall).to(torch.float8_e4m3fn)
    # of its own: matrices that share it are saved beside each other, and safetensors refuses tensors that share memory
    return Codes(q.to(torch.uint8), stored, None, scales.overall.float().clone())


def _exponents(scale: torch.Tensor) -> torch.Tensor:
    """Return powers of two as bytes b that mean 2^(b - 127)."""
    return (torch.log2(scale).round() + 127).to(torch.uint8)


def rounded(
    W_OI: torch.Tensor,
    quant_format: QuantFormat,
    dtype: torch.dtype,
    keep_OI: torch.Tensor | None = None,
    overall: torch.Tensor | None = None,
    *,
    search: bool,
) -> Codes:
    """Return the codes of weights [O, I], any float dtype, without calibration: `fit`, then `to_codes`.

    A few outputs are processed at a time, so that intermediate tensors stay in the caches; all at once where a scale spans all.
    """
    height = quant_format.height(len(W_OI))
    rows = height * max(1, _AT_ONCE // (height * W_OI.shape[1]))
    if quant_format.format == "nvfp4":
        rows = len(W_OI)
    parts: list[Codes] = []
    for start in range(0, len(W_OI), rows):
        W = W_OI[start : start + rows].float().contiguous()
        keep = None if keep_OI is None else keep_OI[start : start + rows]
        parts.append(to_codes(W, quant_format, fit(W, quant_format, None, keep, overall, search=search), dtype, keep))
    zeros = [part.zero for part in parts if part.zero is not None]
    return Codes(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
        parts[0].overall,
    )


def dequantize(codes: Codes, keep_OI: torch.Tensor | None = None) -> torch.Tensor:
    """Return the dequantised weights [O, I] as a loader computes them, in the dtype of the scales; +0 for removed weights."""
    values = dequantized(codes.codes, codes.scale, codes.zero, codes.overall)
    return values if keep_OI is None else values.masked_fill(~keep_OI, 0)


def overflowing(values: torch.Tensor, target: torch.dtype) -> int:
    """How many finite values would become infinite in ``target``, after rounding to nearest even."""
    return int((torch.isinf(values.to(target)) & torch.isfinite(values)).sum())
