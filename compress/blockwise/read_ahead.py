"""Tensors of the next block, read by a thread while a GPU works on this one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from compress.checkpoint.open import Stored
from compress.checkpoint.values import Checkpoint, Value


class ReadAhead:
    """Reads a checkpoint, some of its tensors before they are asked for.

    Args:
        checkpoint: only one on disk is read by a thread; what a pass makes of it is computed when it is asked for.
        pinned: into memory from which a GPU copies while others work.
    """

    def __init__(self, checkpoint: Checkpoint, *, pinned: bool) -> None:
        self._checkpoint, self._pinned = checkpoint, pinned
        self._reader = ThreadPoolExecutor(1)
        self._coming: dict[str, Future[Value]] = {}

    def begin(self, names: Sequence[str]) -> None:
        """Begin to read those tensors; earlier ones that nobody asked for are dropped."""
        for future in self._coming.values():
            future.cancel()
        self._coming = {}
        if isinstance(self._checkpoint, Stored):
            self._coming = {name: self._reader.submit(self._read, name) for name in names}

    def _read(self, name: str) -> Value:
        value = self._checkpoint.tensor(name)
        return Value(value.data.pin_memory()) if self._pinned else value

    def tensor(self, name: str) -> Value:
        """Value of a tensor; its errors are those of the checkpoint."""
        coming = self._coming.pop(name, None)
        return self._checkpoint.tensor(name) if coming is None else coming.result()
