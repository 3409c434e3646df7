"""Values of tensors in a file instead of memory.

Those that a block may go back to, what a backward pass reads, and tables of which few rows are read.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks


class SpilledValues:
    """The values that some tensors have now, in a nameless file; the system removes it with the process.

    Args:
        folder: where the file is. tensors: of any dtype, strides and device.
        values: other values of theirs to write; None for those that they have.
    """

    def __init__(
        self, folder: Path, tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None = None
    ) -> None:
        self._file = _Values(folder)
        self._places = [(t, self._file.add(v)) for t, v in zip(tensors, values or tensors, strict=True)]

    def restore(self) -> None:
        """Give the tensors the values in the file."""
        for tensor, offset in self._places:
            tensor.copy_(self._file.read(tensor, offset))

    def swap(self) -> None:
        """Give the tensors the values in the file, and the file theirs."""
        for tensor, offset in self._places:
            values = self._file.read(tensor, offset)
            self._file.write(tensor, offset)
            tensor.copy_(values)

    def close(self) -> None:
        """Remove the file."""
        self._file.close()


@contextmanager
def spilling_backward(folder: Path, without: Sequence[torch.Tensor], most: int) -> Iterator[None]:
    """Within, what a forward pass saves for the backward pass is in a file as soon as there are ``most`` bytes in memory.

    Both passes are to be within. The values are the same either way.

    Args:
        without: tensors that stay in memory anyhow, such as weights.
    """
    resident = {t.untyped_storage().data_ptr() for t in without}
    seen: set[int] = set()  # storages that are counted: several operations may save one tensor
    file: _Values | None = None
    size = 0

    def pack(tensor: torch.Tensor) -> Any:
        nonlocal size, file
        storage = tensor.untyped_storage()
        if (place := storage.data_ptr()) in resident or place in seen or size + storage.nbytes() <= most:
            if place not in resident and place not in seen:
                seen.add(place)
                size += storage.nbytes()
            return tensor
        file = file or _Values(folder)
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return like, tensor.device, file.add(tensor), file

    def unpack(saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        like, device, offset, written = saved
        values = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        return values.copy_(written.read(like, offset))

    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        if file is not None:
            file.close()


class SpilledByName:
    """Tensors that are taken out one by one, by name; None of them is in memory before.

    Args:
        folder: where their file is. tensors: those in memory, which the caller drops.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        self._places: dict[str, tuple[torch.Tensor, torch.device, int]] = {}
        if tensors:
            self._file = _Values(folder)
        for name, tensor in tensors.items():
            like = torch.empty_like(tensor, device="meta")
            self._places[name] = like, tensor.device, self._file.add(tensor)

    def take(self, name: str) -> torch.Tensor | None:
        """The tensor of that name; None where there is none."""
        if name not in self._places:
            return None
        like, device, offset = self._places[name]
        return self._file.read(like, offset).to(device)


class MappedTables:
    """Embedding tables in a nameless file that is mapped into memory, so that only the rows that are read are resident.

    Args:
        folder: where the file is. module: its embedding layers on the CPU read from the file from now on.
    """

    def __init__(self, folder: Path, module: torch.nn.Module) -> None:
        layers = [m for m in module.modules() if isinstance(m, torch.nn.Embedding)]
        tables = {id(layer.weight): layer.weight for layer in layers if layer.weight.device.type == "cpu"}
        self._map: mmap.mmap | None = None
        if not tables:
            return
        folder.mkdir(parents=True, exist_ok=True)
        file = _Values(folder)
        places = [(table, file.add(table, align=64)) for table in tables.values() if table.numel()]
        self._map = mmap.mmap(file.number, max(1, file.size))
        for table, offset in places:
            values = torch.frombuffer(self._map, dtype=table.dtype, count=table.numel(), offset=offset)
            table.data = values.view(table.shape)
        file.close()  # the map stays

    def release(self) -> None:
        """Let go of the rows that have been read."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class _Values:
    """Tensors' values one after the other in a nameless file."""

    def __init__(self, folder: Path) -> None:
        self._file, self.size = tempfile.TemporaryFile(dir=folder), 0  # noqa: SIM115
        self.number = self._file.fileno()

    def add(self, tensor: torch.Tensor, align: int = 1) -> int:
        """Write a tensor behind the others, at a multiple of ``align``, and return where."""
        offset = -(-self.size // align) * align
        self.size = offset + tensor.numel() * tensor.element_size()
        self.write(tensor, offset)
        return offset

    def write(self, tensor: torch.Tensor, offset: int) -> None:
        """Write a tensor, of any strides and device."""
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        view = memoryview(data.numpy().data)
        while view:
            count = os.pwrite(self.number, view, offset)
            view, offset = view[count:], offset + count

    def read(self, like: torch.Tensor, offset: int) -> torch.Tensor:
        """Values of that shape and dtype, contiguous, on the CPU."""
        values = torch.empty(like.shape, dtype=like.dtype)
        view = memoryview(values.view(-1).view(torch.uint8).numpy().data)
        while view:
            count = os.preadv(self.number, [view], offset)
            assert count
            view, offset = view[count:], offset + count
        return values

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
