"""Hidden states of all calibration samples in files, so that memory holds one batch of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import torch

from compress.blockwise.device_room import DeviceRoom, HeldStates


class HiddenStates(Protocol):
    """Hidden states that are read by sample."""

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        """Hidden states of those samples, [len(rows), …], on the CPU or where they are held."""
        ...


class Activations:
    """A file of float activations [samples, …], read and written by sample.

    Plain reads and writes, not a memory map: the pages stay the system's, which drops them when memory is short.

    Args:
        room: of the device that writes them, where they are held as well, if it has some when the first of them are written.
    """

    def __init__(
        self, path: Path, samples: int, shape: Sequence[int], dtype: torch.dtype, room: DeviceRoom | None = None
    ) -> None:
        self.path, self.samples, self.shape, self.dtype = path, samples, tuple(shape), dtype
        self._room = room
        self._held: HeldStates | None = None
        self._row = prod(self.shape) * torch.empty((), dtype=dtype).element_size()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._file, samples * self._row)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.samples * self._row

    def write(self, rows: Sequence[int], values: torch.Tensor) -> None:
        """Write values [len(rows), …] at those samples."""
        if self._held is None and self._room is not None and self._room.left:
            self._held = HeldStates(self._room, values.new_empty(0, dtype=self.dtype), (self.samples, *self.shape))
        if self._held is not None:
            self._held.write([*rows], values)
        data = values.detach().to("cpu", self.dtype).contiguous().view(len(rows), -1).view(torch.uint8).numpy()
        for row, value in zip(rows, data, strict=True):
            view, offset = memoryview(value.data), row * self._row
            while view:
                count = os.pwrite(self._file, view, offset)
                view, offset = view[count:], offset + count

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        """Values of those samples, [len(rows), …], on the CPU or where they are held."""
        if self._held is not None and (held := self._held.read([*rows])) is not None:
            return held
        buffer = torch.empty(len(rows), self._row, dtype=torch.uint8)
        for row, value in zip(rows, buffer.numpy(), strict=True):
            view, offset = memoryview(value.data), row * self._row
            while view:
                count = os.preadv(self._file, [view], offset)
                assert count, self.path
                view, offset = view[count:], offset + count
        return buffer.view(self.dtype).view(len(rows), *self.shape)

    def sync(self) -> None:
        """Wait until everything is on the disk: a later resume relies on it."""
        os.fsync(self._file)

    def close(self) -> None:
        """Release the file; it stays on the disk."""
        if self._held is not None:
            self._held.close()
        os.close(self._file)


class ActivationStream:
    """Hidden states in front of each block of a list, and behind the last one, in files that take turns.

    With two files a block reads one and writes the other. The file that it reads stays as it is until the next block writes,
    so a process killed at any moment leaves the inputs of the block that it worked on. With a file for each position all
    hidden states are kept. Hidden states of another shape are in files of their own.

    Args:
        name: the files are ``<folder>/<name><number>.act``. shapes: of one sample, in front of each block and behind the last.
        files: how many there are of a shape; position i is in file i mod files.
        room: see `Activations`.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        samples: int,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        *,
        files: int = 2,
        room: DeviceRoom | None = None,
    ) -> None:
        self._folder, self._name, self._files = folder, name, min(files, len(shapes))
        self._samples, self._dtype, self._room = samples, dtype, room
        self._shapes = [tuple(shape) for shape in shapes]
        self._open: dict[str, Activations] = {}

    def _file(self, index: int) -> str:
        kinds = list(dict.fromkeys(self._shapes))
        kind = kinds.index(self._shapes[index])
        return f"{self._name}{index % self._files}{f'-{kind}' if kind else ''}.act"

    def before(self, index: int) -> Activations:
        """Hidden states in front of block ``index``; with a block's number + 1, behind it."""
        file = self._file(index)
        if file not in self._open:
            shape = self._shapes[index]
            self._open[file] = Activations(self._folder / file, self._samples, shape, self._dtype, self._room)
        return self._open[file]

    def release(self, index: int, *, delete: bool = False) -> None:
        """Close the file of that position, and remove it with ``delete``."""
        self._release(self._file(index), delete)

    def _release(self, file: str, delete: bool) -> None:
        states = self._open.pop(file, None)
        if states is not None:
            states.close()
            if delete:
                states.path.unlink(missing_ok=True)  # other processes have it open, for samples of their own

    def close(self) -> None:
        """Close all files; they stay on the disk."""
        for file in list(self._open):
            self._release(file, delete=False)


class BlockStreams:
    """Hidden states around every block of a model, in streams of their own for each list of blocks.

    Args:
        lists: number of a list's first block, and the stream of its hidden states.
    """

    def __init__(self, lists: Sequence[tuple[int, ActivationStream]]) -> None:
        self._lists = lists

    def _at(self, index: int) -> tuple[int, ActivationStream]:
        return next((index - first, stream) for first, stream in reversed(self._lists) if index >= first)

    def before(self, index: int) -> Activations:
        """Hidden states in front of block ``index``."""
        position, stream = self._at(index)
        return stream.before(position)

    def after(self, index: int) -> Activations:
        """Hidden states behind block ``index``."""
        position, stream = self._at(index)
        return stream.before(position + 1)

    def release_before(self, index: int) -> None:
        """Remove the file of the hidden states in front of block ``index``."""
        position, stream = self._at(index)
        stream.release(position, delete=True)

    def release_after(self, index: int) -> None:
        """Remove the file of the hidden states behind block ``index``."""
        position, stream = self._at(index)
        stream.release(position + 1, delete=True)

    def close(self) -> None:
        """Close all files; they stay on the disk."""
        for _, stream in self._lists:
            stream.close()
