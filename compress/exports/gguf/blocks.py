"""Bytes of tensors in GGUF files, from codes. Layouts: ggml-common.h of llama.cpp.

Letters: R rows (outputs), C columns (inputs), B blocks of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.exports.gguf.types import BLOCK
from compress.spec.spec import Tensor

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Codes, Value


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of ``heads`` heads with the two halves of each alternating, as llama.cpp rotates them; 0: as they are."""
    if not heads:
        return rows
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def of_codes(value: Value, tensor: Tensor, kind: str, heads: int = 0) -> torch.Tensor:
    """Bytes uint8 [R, n] of a tensor of integer, mxfp4 or nvfp4 codes.

    Args:
        kind: a type that holds these codes, see `types.chosen`. heads: see `permuted`.
    """
    codes = value.codes
    assert codes is not None
    assert tensor.quant_format is not None
    if kind == "MXFP4":
        return _mxfp4(permuted(codes.codes, heads), permuted(codes.scale, heads))
    if kind == "NVFP4":
        return _nvfp4(permuted(codes.codes, heads), permuted(codes.scale, heads))
    rows, columns = codes.codes.shape
    scale = _by_block(codes.scale, rows, columns)
    zero = None if codes.zero is None else _by_block(codes.zero, rows, columns)
    whole = _blocks(codes.codes).short()
    if zero is not None:
        if kind in ("Q4_1", "Q5_1"):
            half = 1 << (tensor.quant_format.bits - 1)
            low = -(zero.float() + half) * scale.float()
            whole = whole + half
            parts = (permuted(part, heads) for part in (whole, scale, low))
            return _with_minima(*parts, high=kind == "Q5_1")
        whole = whole - zero[..., None]
        if value.mask is not None:
            rows_of_mask = value.mask.mT if tensor.quant_format.transposed else value.mask
            whole = whole * _blocks(rows_of_mask.reshape(rows, columns))
    return _ENCODERS[kind](permuted(whole, heads), permuted(scale, heads))


def _by_block(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Values by row and group ▶ by row and block [R, B]."""
    blocks = columns // BLOCK
    spread = values.expand(rows, values.shape[1])
    return spread.repeat_interleave(blocks // spread.shape[1], 1)


def _blocks(codes: torch.Tensor) -> torch.Tensor:
    """Codes [R, C] ▶ [R, B, 32]."""
    return codes.reshape(codes.shape[0], -1, BLOCK)


def _half(values: torch.Tensor) -> torch.Tensor:
    """Float16 [R, B] as bytes [R, B, 2]."""
    import torch

    return values.to(torch.float16)[..., None].contiguous().view(torch.uint8)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes [R, B, 32] of 4 bits as bytes [R, B, 16]: the first half of a block in the low bits, the second in the high."""
    return codes[..., :16] | (codes[..., 16:] << 4)


def _fifth(codes: torch.Tensor) -> torch.Tensor:
    """Fifth bits of codes [R, B, 32] as bytes [R, B, 4], lowest first."""
    import torch

    bits = (codes >> 4).reshape(*codes.shape[:2], 4, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(3, dtype=torch.uint8)


def _joined(*parts: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat(parts, 2).flatten(1)


def _q4_0(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    import torch

    return _joined(_half(scale), _nibbles((codes + 8).to(torch.uint8)))


def _q5_0(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    import torch

    high = (codes + 16).to(torch.uint8)
    return _joined(_half(scale), _fifth(high), _nibbles(high & 15))


def _q8_0(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    import torch

    return _joined(_half(scale), codes.to(torch.int8).view(torch.uint8))


def _with_minima(codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, *, high: bool) -> torch.Tensor:
    """Q4_1 and, with ``high``, Q5_1: codes from 0 up, and the value of code 0."""
    import torch

    codes = codes.to(torch.uint8)
    return _joined(_half(scale), _half(low), *([_fifth(codes)] if high else []), _nibbles(codes & 15))


def _mxfp4(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return _joined(scale[..., None], _nibbles(_blocks(codes)))


def _nvfp4(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes [R, C] and scales E4M3 [R, C / 16]: the scales of 64 inputs, then their codes, the halves of 16 in a byte each."""
    import torch

    parts = codes.reshape(len(codes), -1, 4, 2, 8)
    nibbles = parts[..., 0, :] | (parts[..., 1, :] << 4)
    return _joined(scale.contiguous().view(torch.uint8).reshape(*nibbles.shape[:2], 4), nibbles.flatten(2))


_ENCODERS = {"Q4_0": _q4_0, "Q5_0": _q5_0, "Q8_0": _q8_0}


def lost_scales(codes: Codes) -> float:
    """Largest relative error of the scales in float16."""
    import torch

    scale = codes.scale.float()
    there = scale != 0
    error = (scale.to(torch.float16).float() / scale - 1).abs()
    return float(error[there].max()) if bool(there.any()) else 0.0
