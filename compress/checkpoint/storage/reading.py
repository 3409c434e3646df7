"""Reading of stored arrays: names of the arrays of a tensor, decoding into values or codes, dequantisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.checkpoint.storage.bits import unpack_bits, unpack_codes

if TYPE_CHECKING:
    import torch


# ---- reading: copied into the modelling file of compact checkpoints ----

#: Storage chain ▶ reader.
READERS: dict[tuple[str, ...], Reader] = {}


class Reader:
    """Reads one storage chain. A subclass with a ``chain`` registers itself."""

    chain: tuple[str, ...] = ()
    coded = False

    def __init_subclass__(cls) -> None:
        if cls.chain:
            READERS[cls.chain] = cls()

    def names(self, grid: dict[str, Any] | None) -> dict[str, str]:
        """Role of an array ▶ what its name adds to that of the tensor."""
        raise NotImplementedError

    def values(
        self, parts: dict[str, torch.Tensor], shape: tuple[int, ...], masked: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values of a plain tensor and its keep-mask, see `decode`."""
        raise NotImplementedError


class CodeReader(Reader):
    """Reads a chain of codes."""

    coded = True

    def codes(
        self,
        parts: dict[str, torch.Tensor],
        rows: tuple[int, ...],
        bits: int,
        mask: torch.Tensor | None,
        zero: torch.Tensor | None,
    ) -> torch.Tensor:
        """Codes of the shape ``rows``; those of removed weights have the value zero. ``zero``: zero points, unpacked."""
        raise NotImplementedError

    def dequantizes(self, codes: torch.Tensor, scale: torch.Tensor) -> bool:
        """Whether these codes become values by `dequantize` of this reader, rather than as integers do."""
        return False

    def dequantize(self, codes: torch.Tensor, scale: torch.Tensor, overall: torch.Tensor | None) -> torch.Tensor:
        """Values of codes that are not integers."""
        raise NotImplementedError


def part_names(name: str, storage: tuple[str, ...], grid: dict[str, Any] | None = None) -> dict[str, str]:
    """Array names by role, for a tensor with this storage chain. Raises ValueError for an unknown chain."""
    reader = READERS.get(storage)
    if reader is None or reader.coded != (grid is not None):
        raise ValueError(f"tensor {name} is stored by {' ∘ '.join(storage)}, which this version cannot read")
    return {role: name + suffix for role, suffix in reader.names(grid).items()}


def decode(
    parts: dict[str, torch.Tensor],
    storage: tuple[str, ...],
    shape: tuple[int, ...],
    masked: bool,
    grid: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values of ``shape``, with removed weights +0.0, and the keep-mask, bool of ``shape``; None without one."""
    if grid is None:
        return READERS[storage].values(parts, shape, masked)
    codes, mask = decode_codes(parts, storage, shape, grid)
    return logical_values(codes, mask, grid, shape), mask


#: Codes [O, I] (int8, float8, or E2M1 codes as uint8), scales [O, G] or of blocks [⌈O/128⌉, G], zero points [O, G] or None, and
#: the global scale [1] or None. With a codebook: int8 indices less half their range, shaped like the tensor, and its values
#: [2**bits] as scales.
StoredCodes = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor | None", "torch.Tensor | None"]


def decode_codes(
    parts: dict[str, torch.Tensor], storage: tuple[str, ...], shape: tuple[int, ...], grid: dict[str, Any]
) -> tuple[StoredCodes, torch.Tensor | None]:
    """Codes, zero for removed weights, and the keep-mask, bool of ``shape``; None without one."""
    import torch

    reader = READERS[storage]
    assert isinstance(reader, CodeReader)
    rows = (*shape[:-2], shape[-1], shape[-2]) if grid["transposed"] else shape
    if grid.get("experts"):
        rows = (rows[0] * rows[1], rows[2])
    elif not _shaped(grid):
        rows = (rows[0], torch.Size(rows[1:]).numel())
    mask = unpack_bits(parts["keep"], rows) if "keep" in parts else None
    bits, scale, zero = int(grid["bits"]), parts["scale"], parts.get("zero")
    if grid.get("whole"):
        scale, zero = scale.reshape(1, 1), None if zero is None else zero.reshape(1, 1)
    if zero is not None and zero.dtype == torch.int32:
        zero = unpack_codes(zero.T.contiguous(), bits, rows[0]).T.contiguous()
    codes = reader.codes(parts, rows, bits, mask, zero)
    across = from_rows(mask, grid, shape) if mask is not None else None
    return (codes, scale, zero, parts.get("overall")), across


def as_rows(values: torch.Tensor, grid: dict[str, Any]) -> torch.Tensor:
    """Values in the tensor's shape ▶ [O, I]: experts one after another, kernels flat. With a codebook, as they are."""
    values = values.mT if grid["transposed"] else values
    if grid.get("experts"):
        return values.flatten(0, 1)
    return values if _shaped(grid) else values.flatten(1)


def _shaped(grid: dict[str, Any]) -> bool:
    """Whether codes have the tensor's shape, as indices into a codebook do."""
    return str(grid["format"]).startswith("codebook")


def from_rows(values: torch.Tensor, grid: dict[str, Any], shape: tuple[int, ...]) -> torch.Tensor:
    """Values [O, I], as `as_rows` gives them ▶ in the tensor's shape, contiguous."""
    if grid["transposed"]:
        return values.reshape(*shape[:-2], shape[-1], shape[-2]).mT.contiguous()
    return values.reshape(shape)


def logical_values(
    codes: StoredCodes, mask: torch.Tensor | None, grid: dict[str, Any], shape: tuple[int, ...]
) -> torch.Tensor:
    """Dequantised values of ``shape``, with removed weights +0.0."""
    values = dequantized(*codes)
    values = from_rows(values, grid, shape)
    return values if mask is None else values.masked_fill(~mask, 0)


def dequantized(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, overall: torch.Tensor | None
) -> torch.Tensor:
    """(q - z) · s, [O, I], computed in the dtype of s as compressed-tensors does; bfloat16 for four-bit floats.

    A ``scale`` with one axis is a codebook, and codes, of any shape, are indices into it.
    """
    for reader in READERS.values():
        if isinstance(reader, CodeReader) and reader.dequantizes(codes, scale):
            return reader.dequantize(codes, scale, overall)
    if len(scale) not in (1, len(codes)):  # 128 outputs share their scales
        scale = scale.repeat_interleave(128, 0)[: len(codes)]
    values = codes.reshape(codes.shape[0], scale.shape[1], -1).to(scale.dtype)
    if zero is not None:
        values = values - zero[..., None].to(scale.dtype)
    return (values * scale[..., None]).flatten(1)
