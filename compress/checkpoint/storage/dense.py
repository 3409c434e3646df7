"""``dense``: the values as they are.

In a float array a removed weight is +0.0 and a kept zero is -0.0. So the array carries its keep-mask; the metadata say which
tensors have one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.checkpoint.storage.base import Arrays, Codec
from compress.checkpoint.storage.reading import Reader
from compress.spec.formats import QuantFormat
from compress.spec.spec import DENSE, Tensor

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Value


class Dense(Codec):
    """The values, in the tensor's shape."""

    chain = DENSE

    def stores(self, quant_format: QuantFormat | None) -> bool:
        """Plain values."""
        return quant_format is None

    def arrays(self, tensor: Tensor) -> Arrays:
        """The values."""
        return {"values": (tensor.shape, tensor.dtype)}

    def encode(self, value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
        """The values."""
        return {"values": value.data.contiguous()}


# ---- reading: copied into the modelling file of compact checkpoints ----


class DenseReader(Reader):
    """Reads ``dense``."""

    chain = ("dense",)

    def names(self, grid: dict[str, Any] | None) -> dict[str, str]:
        """The tensor's own name."""
        return {"values": ""}

    def values(
        self, parts: dict[str, torch.Tensor], shape: tuple[int, ...], masked: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The values; with a mask, that of all bit patterns but that of +0.0."""
        import torch

        values = parts["values"].reshape(shape)
        patterns = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        return values, (values.view(patterns[values.element_size()]) != 0) if masked else None
