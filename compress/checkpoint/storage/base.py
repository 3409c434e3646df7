"""A storage codec: which tensors it stores, the shapes and dtypes of its arrays, and encoding. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from compress.spec.formats import QuantFormat
from compress.spec.spec import DTYPE_BITS, Tensor

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Codes, Value

#: Role of an array ▶ its shape and safetensors dtype, in the order of the file.
Arrays = dict[str, tuple[tuple[int, ...], str]]
#: Storage chain ▶ codec.
CODECS: dict[tuple[str, ...], Codec] = {}


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One array of a file, which stores part of a logical tensor. ``role``: its name in `encode` and `decode`."""

    key: str
    role: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes of the array."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


class Codec(ABC):
    """Writes one storage chain. A subclass with a ``chain`` registers itself; a `reading.Reader` of that chain decodes.

    Attributes:
        chain: codec names, outermost first, as the metadata of weight files hold them.
        masked: whether it stores a keep-mask, so that only tensors with one take it.
        compact: whether only compact checkpoints can hold it.
    """

    chain: ClassVar[tuple[str, ...]]
    masked: ClassVar[bool] = False
    compact: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "chain" in cls.__dict__:
            assert cls.chain not in CODECS, cls.chain
            CODECS[cls.chain] = cls()

    @abstractmethod
    def stores(self, quant_format: QuantFormat | None) -> bool:
        """Whether tensors of this number format are stored by it; None for plain values."""

    def takes(self, tensor: Tensor) -> bool:
        """Whether it can store the tensor, by number format and keep-mask."""
        return self.stores(tensor.quant_format) and (tensor.kept is not None or not self.masked)

    @abstractmethod
    def arrays(self, tensor: Tensor) -> Arrays:
        """Shapes and dtypes of the arrays by role. Their names are `Reader.names`."""

    @abstractmethod
    def encode(self, value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
        """Contiguous arrays by role, as `arrays` describes them."""

    def static_inputs(self, tensor: Tensor) -> tuple[str, ...]:
        """Names of the static input scales and zero points that it stores beside the weight."""
        return ()


def format_of(tensor: Tensor) -> QuantFormat:
    """Number format of a quantised tensor."""
    assert tensor.quant_format is not None, tensor
    return tensor.quant_format


def codes_of(value: Value) -> Codes:
    """Codes of a quantised value."""
    assert value.codes is not None
    return value.codes


def scale_array(tensor: Tensor) -> Arrays:
    """The scales of codes, in the dtype of the values."""
    return {"scale": (format_of(tensor).scales(tensor.shape), tensor.dtype)}


def encoded_scale(value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
    """The scales of codes; one axis for one scale of a whole matrix."""
    scale = codes_of(value).scale
    return {"scale": scale.flatten() if format_of(tensor).whole else scale.contiguous()}
