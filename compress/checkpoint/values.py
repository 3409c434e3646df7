"""Logical tensors and where they come from: a value, its mask and codes; a checkpoint, read or derived from another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from compress.spec.spec import FLOAT_DTYPES, Spec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes, scales and zero points of a quantised matrix, see `spec.formats`. Rows are outputs.

    Attributes:
        codes: [O, I], int8, float8_e4m3fn, or E2M1 codes as uint8.
        scale: [O, G]; [⌈O/128⌉, G] where blocks share a scale, [1, 1] where the whole matrix does.
        zero: int8 [O, G]; None if symmetric.
        overall: float32 [1], the global scale of nvfp4 that scales are divided by.
        static_inputs: static input scales and zero points, of one element each, by name suffix.

    With a codebook, ``codes`` are int8 indices less half the number of values, shaped like the tensor (0 for removed weights),
    and ``scale`` is the codebook [2**bits], ascending, in the tensor's dtype.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    overall: torch.Tensor | None = None
    static_inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Value:
    """Values of a tensor, its keep-mask (bool, same shape) and its codes; None where it has none.

    ``data`` may be a function, called on first use: codes are written and compared without dequantising them.
    """

    __slots__ = ("_data", "codes", "mask")

    def __init__(
        self,
        data: torch.Tensor | Callable[[], torch.Tensor],
        mask: torch.Tensor | None = None,
        codes: Codes | None = None,
    ) -> None:
        self._data, self.mask, self.codes = data, mask, codes

    def with_inputs(self, static_inputs: Mapping[str, torch.Tensor]) -> Value:
        """The same codes with static input scales beside them."""
        assert self.codes is not None
        return Value(self._data, self.mask, replace(self.codes, static_inputs=static_inputs))

    @property
    def data(self) -> torch.Tensor:
        """Values, dequantised on first use."""
        if callable(self._data):
            self._data = self._data()
        return self._data


class Checkpoint(ABC):
    """A spec and its weights. Weights are read on request and not kept.

    Attributes:
        spec: structure, tensors, storage.
        folder: folder of the sidecars; None without any.
        sidecars: paths, relative to ``folder``, of the files that are copied along with the weights.
        metadata: string metadata of the weight files.
        trust_remote_code, ignore_auto_map: the options that it was opened with.
        rewritten: new contents of sidecars, by name.
    """

    spec: Spec
    folder: Path | None
    sidecars: tuple[str, ...]
    metadata: Mapping[str, str]
    trust_remote_code: bool = False
    ignore_auto_map: bool = False
    rewritten: Mapping[str, bytes] = MappingProxyType({})

    @abstractmethod
    def tensor(self, name: str) -> Value:
        """Value of a tensor in canonical form. An alias reads its source."""


class Derived(Checkpoint):
    """A lazily changed checkpoint. Passes return it; the writer reads each tensor once."""

    def __init__(self, base: Checkpoint, spec: Spec, read: Callable[[str], Value]) -> None:
        self.base = base
        self.spec = spec
        self.folder = base.folder
        self.sidecars = base.sidecars
        self.metadata = base.metadata
        self.trust_remote_code, self.ignore_auto_map = base.trust_remote_code, base.ignore_auto_map
        self.rewritten = base.rewritten
        self._read = read

    def tensor(self, name: str) -> Value:
        """Changed value in canonical form."""
        value = self._read(self.spec.tensors[name].alias_of or name)
        if value.mask is None:
            return value
        if value.codes is not None:  # codes of removed weights are zero already
            return value
        return Value(canonical(value.data, value.mask), value.mask)


def torch_dtype(dtype: str) -> torch.dtype:
    """Safetensors dtype string ▶ torch dtype."""
    import torch

    names = {
        **FLOAT_DTYPES,
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
        "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
        "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    }  # fmt: skip
    result: torch.dtype = getattr(torch, names[dtype])
    return result


def canonical(data: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Canonical form, from which the mask can be read: removed weights are +0.0, kept zeros are -0.0."""
    import torch

    zero = torch.zeros((), dtype=data.dtype, device=data.device)
    return torch.where(mask, torch.where(data == 0, -zero, data), zero)
