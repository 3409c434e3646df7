"""Blocks of ggml, the storage of GGUF files: floats, integers with scales by block, and "K" and "IQ4" super-blocks.

Values are computed in float32, in the order of operations of the reference (``gguf.quants``), so they are equal bit for bit.
Letters in the functions: B number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.checkpoint.dequantize.base import all_finite, fill
from compress.checkpoint.values import torch_dtype

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A type of tensors: its name, and values and bytes per block. ``dtype``: safetensors dtype of floats; None for codes."""

    name: str
    values: int
    bytes: int
    dtype: str | None = None


#: Number in the file ▶ type.
TYPES: Mapping[int, GgmlType] = {
    0: GgmlType("F32", 1, 4, "F32"),
    1: GgmlType("F16", 1, 2, "F16"),
    30: GgmlType("BF16", 1, 2, "BF16"),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    20: GgmlType("IQ4_NL", 32, 18),
    23: GgmlType("IQ4_XS", 256, 136),
    39: GgmlType("MXFP4", 32, 17),
    40: GgmlType("NVFP4", 64, 36),
}
#: Names of types that are not read, for errors.
OTHERS: Mapping[int, str] = {
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    41: "Q1_0",
}  # fmt: skip
#: Values of the codes of MXFP4 and NVFP4: E2M1.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
#: Values of the codes of IQ4_NL and IQ4_XS.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def dequantize(blocks: torch.Tensor, kind: GgmlType, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Values of ``shape`` from the bytes of a tensor, a block after the other. Raises ValueError for values that are none."""
    import torch

    if kind.dtype is not None:
        out = blocks.view(torch_dtype(kind.dtype)).to(dtype)
    else:
        rows = blocks.view(torch.uint8).reshape(-1, kind.bytes)
        out = torch.empty(len(rows), kind.values, dtype=dtype)
        fill(out, lambda places: _DECODERS[kind.name](rows[places]))
    if not all_finite(out):
        raise ValueError("its values are NaN or infinite: the file is damaged")
    return out.reshape(shape)


def _halves(blocks: torch.Tensor) -> torch.Tensor:
    """Float16 scale [B, 1] in two bytes, as float32."""
    import torch

    return blocks.contiguous().view(torch.float16).float()


def _nibbles(codes: torch.Tensor, run: int) -> torch.Tensor:
    """Codes [B, 2n] of bytes [B, n]: for each run of bytes all low halves, then all high halves."""
    import torch

    parts = codes.reshape(len(codes), -1, 1, run)
    return torch.cat((parts & 15, parts >> 4), 2).flatten(1)


def _bits(codes: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """Codes of ``bits`` bits: for each run of bytes the lowest bits of all, then the next ones."""
    import torch

    parts = codes.reshape(len(codes), -1, 1, run)
    return torch.cat([(parts >> place) & ((1 << bits) - 1) for place in range(0, 8, bits)], 2).flatten(1)


def _fifth(high: torch.Tensor) -> torch.Tensor:
    """Fifth bits [B, 32] of four bytes, lowest first, shifted to their place."""
    import torch

    places = torch.arange(8, dtype=torch.uint8)
    return (((high[:, :, None] >> places) & 1) << 4).flatten(1)


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return _halves(b[:, :2]) * (_nibbles(b[:, 2:], 16).float() - 8)


def _q4_1(b: torch.Tensor) -> torch.Tensor:
    return _halves(b[:, :2]) * _nibbles(b[:, 4:], 16).float() + _halves(b[:, 2:4])


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    return _halves(b[:, :2]) * ((_nibbles(b[:, 6:], 16) | _fifth(b[:, 2:6])).float() - 16)


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    return _halves(b[:, :2]) * (_nibbles(b[:, 8:], 16) | _fifth(b[:, 4:8])).float() + _halves(b[:, 2:4])


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    import torch

    return b[:, 2:].contiguous().view(torch.int8).float() * _halves(b[:, :2])


def _q2_k(b: torch.Tensor) -> torch.Tensor:
    scales, codes = b[:, :16], _bits(b[:, 16:80], 2, 32).float().reshape(-1, 16, 16)
    scale, low = _halves(b[:, 80:82]) * (scales & 15).float(), _halves(b[:, 82:84]) * (scales >> 4).float()
    return (scale[..., None] * codes - low[..., None]).flatten(1)


def _q3_k(b: torch.Tensor) -> torch.Tensor:
    high, low = _bits(b[:, :32], 1, 32), _bits(b[:, 32:96], 2, 32)
    scales = (_nibbles(b[:, 96:104], 8) | (_bits(b[:, 104:108], 2, 4) << 4)).float() - 32
    codes = low.float() - ((high ^ 1) << 2).float()  # a set bit means that four is not taken away
    return ((_halves(b[:, 108:110]) * scales)[..., None] * codes.reshape(-1, 16, 16)).flatten(1)


def _scales_and_lows(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima [B, 8, 1] of Q4_K and Q5_K: 6-bit factors in twelve bytes, after their two float16 scales."""
    import torch

    d, m, both = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat((d & 63, (both & 15) | ((d >> 2) & 48)), 1).float()
    lows = torch.cat((m & 63, (both >> 4) | ((m >> 2) & 48)), 1).float()
    return (_halves(b[:, :2]) * scales)[..., None], (_halves(b[:, 2:4]) * lows)[..., None]


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    scale, low = _scales_and_lows(b)
    return (scale * _nibbles(b[:, 16:], 32).float().reshape(-1, 8, 32) - low).flatten(1)


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    scale, low = _scales_and_lows(b)
    codes = _nibbles(b[:, 48:], 32) | (_bits(b[:, 16:48], 1, 32) << 4)
    return (scale * codes.float().reshape(-1, 8, 32) - low).flatten(1)


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    import torch

    codes = (_nibbles(b[:, :128], 64) | (_bits(b[:, 128:192], 2, 32) << 4)).float() - 32
    scale = _halves(b[:, 208:210]) * b[:, 192:208].contiguous().view(torch.int8).float()
    return (scale[..., None] * codes.reshape(-1, 16, 16)).flatten(1)


def _iq4_nl(b: torch.Tensor) -> torch.Tensor:
    import torch

    return _halves(b[:, :2]) * torch.tensor(_IQ4, dtype=torch.float32)[_nibbles(b[:, 2:], 16).long()]


def _iq4_xs(b: torch.Tensor) -> torch.Tensor:
    import torch

    low = torch.stack((b[:, 4:8] & 15, b[:, 4:8] >> 4), 2).flatten(1)
    places = torch.arange(0, 8, 2, dtype=torch.uint8)
    high = ((b[:, 2:4, None] >> places) & 3).flatten(1)
    scale = _halves(b[:, :2]) * ((low | (high << 4)).float() - 32)
    codes = torch.tensor(_IQ4, dtype=torch.float32)[_nibbles(b[:, 8:], 16).long()]
    return (scale[..., None] * codes.reshape(-1, 8, 32)).flatten(1)


def _mxfp4(b: torch.Tensor) -> torch.Tensor:
    import torch

    scale = torch.exp2(b[:, :1].float() - 127)
    return scale * torch.tensor(E2M1)[_nibbles(b[:, 1:], 16).long()]


def _nvfp4(b: torch.Tensor) -> torch.Tensor:
    import torch

    unsigned = b[:, :4] & 0x7F  # llama.cpp reads no sign, and the code of NaN as 0
    scale = torch.where(unsigned == 0x7F, 0, unsigned).view(torch.float8_e4m3fn).float()
    codes = torch.tensor(E2M1)[_nibbles(b[:, 4:], 8).long()]
    return (scale[..., None] * codes.reshape(-1, 4, 16)).flatten(1)


_DECODERS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k,
    "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}  # fmt: skip
