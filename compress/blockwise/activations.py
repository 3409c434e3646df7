"""Activations of all calibration samples in a file, so that memory holds one batch of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch


class Activations:
    """A file of float activations [samples, …], read and written by sample.

    Plain reads and writes, not a memory map: the pages stay the system's, which gives them up when memory is short.
    """

    def __init__(self, path: Path, samples: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.path, self.samples, self.shape, self.dtype = path, samples, tuple(shape), dtype
        self._row = prod(self.shape) * torch.empty((), dtype=dtype).element_size()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._file, samples * self._row)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.samples * self._row

    def write(self, rows: Sequence[int], values: torch.Tensor) -> None:
        """Put values [len(rows), …] at those samples."""
        data = values.detach().to("cpu", self.dtype).contiguous().view(len(rows), -1).view(torch.uint8).numpy()
        for row, value in zip(rows, data, strict=True):
            view, offset = memoryview(value.data), row * self._row
            while view:
                count = os.pwrite(self._file, view, offset)
                view, offset = view[count:], offset + count

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        """Values of those samples, [len(rows), …]."""
        buffer = torch.empty(len(rows), self._row, dtype=torch.uint8)
        for row, value in zip(rows, buffer.numpy(), strict=True):
            view, offset = memoryview(value.data), row * self._row
            while view:
                count = os.preadv(self._file, [view], offset)
                assert count, self.path
                view, offset = view[count:], offset + count
        return buffer.view(self.dtype).view(len(rows), *self.shape)

    def sync(self) -> None:
        """Wait until all is on the disk: a later resume relies on it."""
        os.fsync(self._file)

    def close(self) -> None:
        """Release the file; it stays on disk."""
        os.close(self._file)
