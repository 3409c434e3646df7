"""``trellis``: codes of K bits that step through a trellis, and a scale for each output; no keep-mask.

The codes of up to 256 consecutive outputs of one input are a sequence, which is circular. The state of a weight is made of
its code and those before it in the sequence, 10 bits in all; each state has a fixed value. The values times the scales are
the weights, rotated along their inputs: each block of inputs, as long as the largest power of two that divides them, by a
Hadamard matrix, after fixed changes of sign. Source: QTIP (arXiv 2406.11235): bitshift trellis, tail-biting; incoherence as
in QuIP# (arXiv 2402.04396), on the inputs alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.checkpoint.storage.base import Arrays, Codec, codes_of, encoded_scale, format_of, scale_array
from compress.checkpoint.storage.bits import pack_codes, unpack_codes, words
from compress.checkpoint.storage.reading import CodeReader
from compress.spec.formats import QuantFormat
from compress.spec.spec import Tensor

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Value


class Trellis(Codec):
    """Codes of each output's weights, packed, and scales."""

    chain = ("trellis",)
    compact = True

    def stores(self, quant_format: QuantFormat | None) -> bool:
        """Trellis codes."""
        return quant_format is not None and quant_format.is_trellis

    def takes(self, tensor: Tensor) -> bool:
        """Tensors without a keep-mask."""
        return super().takes(tensor) and tensor.kept is None

    def arrays(self, tensor: Tensor) -> Arrays:
        """Codes and scales."""
        outputs, inputs = format_of(tensor).rows(tensor.shape)
        return {"codes": ((outputs, words(inputs, format_of(tensor).bits)), "I32"), **scale_array(tensor)}

    def encode(self, value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
        """Codes and scales."""
        import torch

        bits, states = format_of(tensor).bits, codes_of(value).codes
        codes = (states & ((1 << bits) - 1)) - (1 << (bits - 1))
        return {"codes": pack_codes(codes.to(torch.int8), bits), **encoded_scale(value, tensor)}


# ---- reading: copied into the modelling file of compact checkpoints ----

#: Bits of a state.
STATE_BITS = 10
#: Most outputs of a sequence.
LONGEST = 256
#: Weights looked up at a time.
_STATES = 1 << 20


def sequences(outputs: int) -> list[int]:
    """Lengths of the sequences of a column, which follow one another: as few as possible, longer ones first."""
    count = -(-outputs // LONGEST)
    return [outputs // count + (i < outputs % count) for i in range(count)]


def state_values() -> torch.Tensor:
    """Values of the states, float32 [1024]: quantiles of a normal distribution, in a fixed order without pattern.

    The quantile of u is that of Tukey's lambda distribution, which is close to the normal one, as a multiple of 1/1024:
    so every machine computes the same.
    """
    import torch

    most = (1 << STATE_BITS) - 1
    order = torch.arange(1 << STATE_BITS)
    for factor, shift in ((693, 5), (2639, 4), (693, STATE_BITS)):  # each step maps the states one to one
        order = order * factor & most
        order = order ^ (order >> shift)
    share = (order.double() + 0.5) / (1 << STATE_BITS)
    quantiles = (share**0.135 - (1 - share) ** 0.135) / 0.1975
    return ((quantiles * 1024).round() / 1024).float()


def states_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [O, I], from 0 up ▶ states, int16 [O, I]."""
    import torch

    states = codes.to(torch.int16)
    for part in torch.split(states, sequences(len(codes))):
        own, place = part.clone(), bits
        for before in range(1, -(-STATE_BITS // bits)):
            part |= own.roll(before, 0) << place
            place += bits
        part &= (1 << STATE_BITS) - 1
    return states


def rotate(values: torch.Tensor, back: bool = False) -> torch.Tensor:
    """Rows [O, I] times the rotation of their inputs, or its inverse; float32.

    The rotation is its own transpose's inverse. Blocks of inputs: the largest power of two that divides their number.
    """
    import torch

    inputs = values.shape[1]
    size = inputs & -inputs
    places = torch.arange(inputs, device=values.device)
    sign = 1.0 - 2.0 * ((places * 40503 >> 7 ^ places * 30011 >> 5) & 1).float()
    turned = values.float() if back else values.float() * sign
    step = 1
    while step < size:
        pairs = turned.reshape(len(values), inputs // (2 * step), 2, step)
        turned = torch.cat([pairs[:, :, :1] + pairs[:, :, 1:], pairs[:, :, :1] - pairs[:, :, 1:]], 2)
        step *= 2
    turned = turned.reshape(values.shape) * float(size**-0.5)
    return turned * sign if back else turned


class TrellisReader(CodeReader):
    """Reads ``trellis``."""

    chain = ("trellis",)

    def names(self, grid: dict[str, Any] | None) -> dict[str, str]:
        """Codes and scales."""
        return {"codes": ".codes", "scale": ".scale"}

    def codes(
        self,
        parts: dict[str, torch.Tensor],
        rows: tuple[int, ...],
        bits: int,
        mask: torch.Tensor | None,
        zero: torch.Tensor | None,
    ) -> torch.Tensor:
        """States, int16 [O, I]."""
        return states_of(unpack_codes(parts["codes"], bits, rows[1]) + (1 << (bits - 1)), bits)

    def dequantizes(self, codes: torch.Tensor, scale: torch.Tensor) -> bool:
        """Whether the codes are states: no others are int16."""
        import torch

        return codes.dtype == torch.int16

    def dequantize(self, codes: torch.Tensor, scale: torch.Tensor, overall: torch.Tensor | None) -> torch.Tensor:
        """Weights [O, I], in the dtype of the scales."""
        import torch

        table = state_values().to(codes.device)
        values = torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)
        step = max(1, _STATES // codes.shape[1])
        for start in range(0, len(codes), step):
            rows = slice(start, start + step)
            values[rows] = rotate(table[codes[rows].int()] * scale[rows].float(), back=True).to(scale.dtype)
        return values
