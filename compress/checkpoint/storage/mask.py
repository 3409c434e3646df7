"""``mask``: a keep-mask of one bit per weight, and the kept values or integer codes alone. `codebook` has its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.checkpoint.storage.base import (
    Arrays,
    Codec,
    codes_of,
    encoded_scale,
    format_of,
    scale_array,
)
from compress.checkpoint.storage.bits import pack_bits, pack_codes, unpack_bits, unpack_codes, words
from compress.checkpoint.storage.packed import (
    INT8,
    PACKED,
    encoded_zero,
    is_packed,
    zero_array,
)
from compress.checkpoint.storage.reading import CodeReader, Reader, as_rows
from compress.spec.formats import QuantFormat
from compress.spec.spec import Tensor

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Value

MASKED: tuple[str, ...] = ("mask", "dense")


def keep_array(tensor: Tensor) -> Arrays:
    """The keep-mask, eight weights to a byte."""
    return {"keep": (((tensor.count + 7) // 8,), "U8")}


def kept_codes(tensor: Tensor) -> Arrays:
    """Codes of the kept weights, packed as one row."""
    assert tensor.kept is not None, tensor
    return {"codes": ((words(tensor.kept, format_of(tensor).bits),), "I32")}


def encoded_kept(value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
    """The keep-mask in the layout of the codes, and the codes of the kept weights."""
    assert value.mask is not None, tensor
    mask = as_rows(value.mask, format_of(tensor).to_json())
    return {"keep": pack_bits(mask), "codes": pack_codes(codes_of(value).codes[mask][None], format_of(tensor).bits)[0]}


class MaskedDense(Codec):
    """The kept values, in row-major order."""

    chain = MASKED
    masked = compact = True

    def stores(self, quant_format: QuantFormat | None) -> bool:
        """Plain values."""
        return quant_format is None

    def arrays(self, tensor: Tensor) -> Arrays:
        """The keep-mask and the kept values."""
        assert tensor.kept is not None, tensor
        return {**keep_array(tensor), "values": ((tensor.kept,), tensor.dtype)}

    def encode(self, value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
        """The keep-mask and the kept values."""
        assert value.mask is not None, tensor
        return {"keep": pack_bits(value.mask), "values": value.data[value.mask]}


class MaskedIntegers(Codec):
    """The packed codes of the kept weights, with scales and packed zero points."""

    chain = ("mask", *PACKED)
    masked = compact = True

    def stores(self, quant_format: QuantFormat | None) -> bool:
        """The integers of `PackedIntegers`."""
        return quant_format is not None and quant_format.is_integer and is_packed(quant_format)

    def arrays(self, tensor: Tensor) -> Arrays:
        """The keep-mask, the kept codes, scales and zero points."""
        return {**keep_array(tensor), **kept_codes(tensor), **scale_array(tensor), **zero_array(tensor)}

    def encode(self, value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
        """The keep-mask, the kept codes, scales and zero points."""
        return {**encoded_kept(value, tensor), **encoded_scale(value, tensor), **encoded_zero(value, tensor)}


class MaskedBytes(MaskedIntegers):
    """The same for the integers that lie in bytes without a keep-mask."""

    chain = ("mask", *INT8)

    def stores(self, quant_format: QuantFormat | None) -> bool:
        """The integers of `ByteIntegers`, but no single zero point of a whole matrix: zero points are packed along outputs."""
        if quant_format is None or not quant_format.is_integer or is_packed(quant_format):
            return False
        return quant_format.symmetric or not quant_format.whole

    def static_inputs(self, tensor: Tensor) -> tuple[str, ...]:
        """Name suffixes of the static input scales that the number format has."""
        return format_of(tensor).static_inputs


# ---- reading: copied into the modelling file of compact checkpoints ----


class MaskedDenseReader(Reader):
    """Reads ``mask``, ``dense``."""

    chain = ("mask", "dense")

    def names(self, grid: dict[str, Any] | None) -> dict[str, str]:
        """Keep-mask and kept values."""
        return {"keep": ".keep", "values": ".values"}

    def values(
        self, parts: dict[str, torch.Tensor], shape: tuple[int, ...], masked: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The kept values in their places, zeros elsewhere, and the mask."""
        import torch

        mask = unpack_bits(parts["keep"], shape)
        values = torch.zeros(shape, dtype=parts["values"].dtype, device=parts["values"].device)
        if int(mask.sum()) != parts["values"].numel():
            raise ValueError(f"the keep-mask keeps {int(mask.sum())} weights, {parts['values'].numel()} are stored")
        values.masked_scatter_(mask, parts["values"])
        return values, mask


class MaskedIntegersReader(CodeReader):
    """Reads ``mask``, ``pack-quantized``."""

    chain = ("mask", "pack-quantized")

    def names(self, grid: dict[str, Any] | None) -> dict[str, str]:
        """Keep-mask, kept codes, scales and zero points."""
        zero = {} if grid is None or grid["symmetric"] else {"zero": "_zero_point"}
        return {"keep": ".keep", "codes": ".codes", "scale": "_scale", **zero}

    def codes(
        self,
        parts: dict[str, torch.Tensor],
        rows: tuple[int, ...],
        bits: int,
        mask: torch.Tensor | None,
        zero: torch.Tensor | None,
    ) -> torch.Tensor:
        """The kept codes in their places; removed weights have the code of the zero point."""
        import torch

        codes = torch.zeros(rows, dtype=torch.int8)
        if zero is not None:
            codes = codes + zero.repeat_interleave(rows[1] // zero.shape[1], 1)
        return place_kept(parts["codes"], bits, mask, codes)


class MaskedBytesReader(MaskedIntegersReader):
    """Reads ``mask``, ``int-quantized``."""

    chain = ("mask", "int-quantized")


def place_kept(packed: torch.Tensor, bits: int, mask: torch.Tensor | None, codes: torch.Tensor) -> torch.Tensor:
    """Write the packed codes of the kept weights into ``codes``. Raises ValueError if their number is not the mask's."""
    assert mask is not None
    kept = int(mask.sum())
    if packed.numel() != -(-kept * bits // 32):
        raise ValueError(f"the keep-mask keeps {kept} weights, {packed.numel()} words of codes are stored")
    return codes.masked_scatter_(mask, unpack_codes(packed[None], bits, kept)[0])
