"""Storage chains: which one a tensor gets, the exact parts it will have, and the writing half of each codec.

Planning needs no torch. The reading half is in `decode`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal

from compress.checkpoint.spec import DENSE, DTYPE_BITS, MASKED, Spec, Tensor

if TYPE_CHECKING:
    import torch

Store = Literal["stock", "compact"]


@dataclass(frozen=True, slots=True)
class Part:
    """One array in the file that carries a piece of a logical tensor."""

    key: str
    role: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes of the array."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def parts(tensor: Tensor) -> list[Part]:
    """The arrays that the tensor's storage chain writes, with exact shapes."""
    if tensor.storage == DENSE:
        return [Part(tensor.name, "values", tensor.shape, tensor.dtype)]
    assert tensor.storage == MASKED, tensor
    assert tensor.kept is not None, tensor
    return [
        Part(f"{tensor.name}.keep", "keep", ((tensor.count + 7) // 8,), "U8"),
        Part(f"{tensor.name}.values", "values", (tensor.kept,), tensor.dtype),
    ]


def with_storage(spec: Spec, store: Store) -> Spec:
    """The spec with the chain that each tensor gets in that store: the smallest, dense where equal."""

    def choose(tensor: Tensor) -> Tensor:
        candidates = [DENSE]
        if store == "compact" and tensor.kept is not None:
            candidates.append(MASKED)
        options = [replace(tensor, storage=chain) for chain in candidates]
        return min(options, key=lambda t: sum(part.bytes for part in parts(t)))

    return spec.map(choose)


def needs_code(spec: Spec) -> bool:
    """Whether only the bundled modelling file can load the spec as stored."""
    return bool(spec.structure.edits) or any(tensor.storage != DENSE for tensor in spec.stored())


def encode(data: torch.Tensor, mask: torch.Tensor | None, tensor: Tensor) -> dict[str, torch.Tensor]:
    """Values in canonical form (see `canonical`) ▶ role ▶ contiguous array, as `parts` says."""
    if tensor.storage == DENSE:
        return {"values": data.contiguous()}
    assert mask is not None
    return {"keep": pack_bits(mask), "values": data[mask]}


def canonical(data: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Removed weights +0.0, kept zeros -0.0: the form in which values and mask determine each other."""
    import torch

    zero = torch.zeros((), dtype=data.dtype, device=data.device)
    return torch.where(mask, torch.where(data == 0, -zero, data), zero)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Bool [...] with n elements ▶ uint8 [ceil(n / 8)], lowest bit first."""
    import torch

    flat = mask.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = (1 << torch.arange(8, device=mask.device)).to(torch.uint8)
    return (flat * weights).sum(1, dtype=torch.uint8)
