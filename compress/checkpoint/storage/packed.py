"""Integer codes: ``pack-quantized``, packed into 32-bit words, and ``int-quantized``, a byte each.

compressed-tensors has both. `bits` packs.
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

PACKED: tuple[str, ...] = ("pack-quantized",)
INT8: tuple[str, ...] = ("int-quantized",)


def is_packed(quant_format: QuantFormat) -> bool:
    """Whether integers are packed: all but those of 8 bits that runtimes compute with, or that have one scale alone."""
    return quant_format.bits != 8 or (quant_format.activations is None and not quant_format.whole)


def zero_array(tensor: Tensor) -> Arrays:
    """Zero points packed along the outputs; none if symmetric."""
    quant_format = format_of(tensor)
    if quant_format.symmetric:
        return {}
    outputs, groups = quant_format.scales(tensor.shape)
    return {"zero": ((words(outputs, quant_format.bits), groups), "I32")}


def encoded_zero(value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
    """Zero points packed along the outputs; none if symmetric."""
    zero = codes_of(value).zero
    return {} if zero is None else {"zero": pack_codes(zero.T, format_of(tensor).bits).T.contiguous()}


def byte_zero_array(tensor: Tensor) -> Arrays:
    """Zero points, a byte each; none if symmetric."""
    quant_format = format_of(tensor)
    return {} if quant_format.symmetric else {"zero": (quant_format.scales(tensor.shape), "I8")}


def encoded_byte_zero(value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
    """Zero points, a byte each; one axis for one of a whole matrix; none if symmetric."""
    zero = codes_of(value).zero
    if zero is None:
        return {}
    return {"zero": zero.flatten() if format_of(tensor).whole else zero.contiguous()}


class PackedIntegers(Codec):
    """Codes, each row packed without gaps; its scales, shape and packed zero points."""

    chain = PACKED

    def stores(self, quant_format: QuantFormat | None) -> bool:
        """Integers, see `is_packed`."""
        return quant_format is not None and quant_format.is_integer and is_packed(quant_format)

    def arrays(self, tensor: Tensor) -> Arrays:
        """Codes, scales, shape and zero points."""
        outputs, inputs = format_of(tensor).rows(tensor.shape)
        codes = (outputs, words(inputs, format_of(tensor).bits))
        return {"codes": (codes, "I32"), **scale_array(tensor), "shape": ((2,), "I64"), **zero_array(tensor)}

    def encode(self, value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
        """Codes, scales, shape and zero points."""
        import torch

        codes = codes_of(value).codes
        return {
            "codes": pack_codes(codes, format_of(tensor).bits),
            **encoded_scale(value, tensor),
            "shape": torch.tensor(codes.shape),
            **encoded_zero(value, tensor),
        }


class ByteIntegers(Codec):
    """Codes of 8 bits, with scales and zero points of 8 bits."""

    chain = INT8

    def stores(self, quant_format: QuantFormat | None) -> bool:
        """Integers, see `is_packed`."""
        return quant_format is not None and quant_format.is_integer and not is_packed(quant_format)

    def static_inputs(self, tensor: Tensor) -> tuple[str, ...]:
        """Name suffixes of the static input scales that the number format has."""
        return format_of(tensor).static_inputs

    def arrays(self, tensor: Tensor) -> Arrays:
        """Codes, scales and zero points."""
        codes = format_of(tensor).rows(tensor.shape)
        return {"codes": (codes, "I8"), **scale_array(tensor), **byte_zero_array(tensor)}

    def encode(self, value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
        """Codes, scales and zero points."""
        codes = codes_of(value).codes.contiguous()
        return {"codes": codes, **encoded_scale(value, tensor), **encoded_byte_zero(value, tensor)}


# ---- reading: copied into the modelling file of compact checkpoints ----


class PackedIntegersReader(CodeReader):
    """Reads ``pack-quantized``."""

    chain = ("pack-quantized",)

    def names(self, grid: dict[str, Any] | None) -> dict[str, str]:
        """Codes, scales, shape and zero points."""
        zero = {} if grid is None or grid["symmetric"] else {"zero": "_zero_point"}
        return {"codes": "_packed", "scale": "_scale", "shape": "_shape", **zero}

    def codes(
        self,
        parts: dict[str, torch.Tensor],
        rows: tuple[int, ...],
        bits: int,
        mask: torch.Tensor | None,
        zero: torch.Tensor | None,
    ) -> torch.Tensor:
        """Unpacked codes."""
        return unpack_codes(parts["codes"], bits, rows[1])


class ByteIntegersReader(CodeReader):
    """Reads ``int-quantized``."""

    chain = ("int-quantized",)

    def names(self, grid: dict[str, Any] | None) -> dict[str, str]:
        """Codes, scales and zero points."""
        zero = {} if grid is None or grid["symmetric"] else {"zero": "_zero_point"}
        return {"codes": "", "scale": "_scale", **zero}

    def codes(
        self,
        parts: dict[str, torch.Tensor],
        rows: tuple[int, ...],
        bits: int,
        mask: torch.Tensor | None,
        zero: torch.Tensor | None,
    ) -> torch.Tensor:
        """The stored codes."""
        return parts["codes"]
