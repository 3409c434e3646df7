"""``codebook``: indices into the values of a codebook, of which each tensor has its own; with a keep-mask if it has one.

A codebook may lack the value zero, so a keep-mask is always stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.checkpoint.storage.base import Arrays, Codec, codes_of, format_of
from compress.checkpoint.storage.bits import pack_codes, unpack_codes, words
from compress.checkpoint.storage.mask import encoded_kept, keep_array, kept_codes, place_kept
from compress.checkpoint.storage.reading import CodeReader
from compress.spec.formats import QuantFormat
from compress.spec.spec import Tensor

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Value

CODEBOOK: tuple[str, ...] = ("codebook",)


class Codebook(Codec):
    """Indices of all weights, packed as one row, and the codebook, ascending."""

    chain = CODEBOOK
    compact = True

    def stores(self, quant_format: QuantFormat | None) -> bool:
        """Indices."""
        return quant_format is not None and quant_format.is_codebook

    def takes(self, tensor: Tensor) -> bool:
        """Tensors without a keep-mask."""
        return super().takes(tensor) and (tensor.kept is not None) == self.masked

    def arrays(self, tensor: Tensor) -> Arrays:
        """Indices and the codebook."""
        return {"codes": ((words(tensor.count, format_of(tensor).bits),), "I32"), **_book(tensor)}

    def encode(self, value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
        """Indices and the codebook."""
        codes = codes_of(value)
        packed = pack_codes(codes.codes.reshape(1, -1), format_of(tensor).bits)[0]
        return {"codes": packed, "scale": codes.scale.contiguous()}


class MaskedCodebook(Codebook):
    """The keep-mask, indices of the kept weights, and the codebook."""

    chain = ("mask", *CODEBOOK)
    masked = True

    def arrays(self, tensor: Tensor) -> Arrays:
        """The keep-mask, indices and the codebook."""
        return {**keep_array(tensor), **kept_codes(tensor), **_book(tensor)}

    def encode(self, value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
        """The keep-mask, indices and the codebook."""
        return {**encoded_kept(value, tensor), "scale": codes_of(value).scale.contiguous()}


def _book(tensor: Tensor) -> Arrays:
    """The codebook, in the dtype of the values."""
    return {"scale": ((1 << format_of(tensor).bits,), tensor.dtype)}


# ---- reading: copied into the modelling file of compact checkpoints ----

#: Indices looked up at a time.
_LOOKUPS = 1 << 22


class CodebookReader(CodeReader):
    """Reads ``codebook``."""

    chain: tuple[str, ...] = ("codebook",)

    def names(self, grid: dict[str, Any] | None) -> dict[str, str]:
        """Indices and the codebook."""
        return {"codes": ".codes", "scale": ".codebook"}

    def codes(
        self,
        parts: dict[str, torch.Tensor],
        rows: tuple[int, ...],
        bits: int,
        mask: torch.Tensor | None,
        zero: torch.Tensor | None,
    ) -> torch.Tensor:
        """Indices less half their number. Raises ValueError for wrong numbers of them or of values."""
        import torch

        if len(parts["scale"]) != 1 << bits:
            raise ValueError(f"a codebook of {bits} bits has {1 << bits} values, {len(parts['scale'])} are stored")
        packed, count = parts["codes"], torch.Size(rows).numel()
        if mask is not None:
            return place_kept(packed, bits, mask, torch.zeros(rows, dtype=torch.int8))
        if packed.numel() != -(-count * bits // 32):
            raise ValueError(f"there are {count} weights, {packed.numel()} words of codes are stored")
        return unpack_codes(packed[None], bits, count).reshape(rows)

    def dequantizes(self, codes: torch.Tensor, scale: torch.Tensor) -> bool:
        """Whether the scales are a codebook: no others have one axis."""
        return scale.ndim == 1

    def dequantize(self, codes: torch.Tensor, scale: torch.Tensor, overall: torch.Tensor | None) -> torch.Tensor:
        """Values of the codebook, in the shape of the indices."""
        import torch

        values = torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)
        pieces = zip(torch.split(codes.flatten(), _LOOKUPS), torch.split(values.view(-1), _LOOKUPS), strict=True)
        for piece, into in pieces:
            torch.index_select(scale, 0, piece.int() + len(scale) // 2, out=into)
        return values


class MaskedCodebookReader(CodebookReader):
    """Reads ``mask``, ``codebook``."""

    chain = ("mask", "codebook")

    def names(self, grid: dict[str, Any] | None) -> dict[str, str]:
        """The keep-mask, indices and the codebook."""
        return {"keep": ".keep", "codes": ".codes", "scale": ".codebook"}
