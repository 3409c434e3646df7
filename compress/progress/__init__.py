"""Progress of long work. Nothing here prints; `compress.progress.display` shows it."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self


class ProgressTask(Protocol):
    """A task in progress; a context manager."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count ``steps`` more units as done; ``note`` names the current one (a tensor, a document)."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Progress(Protocol):
    """Receives the progress of passes, evaluation and the writer."""

    def stage(self, index: int, total: int, title: str) -> None:
        """Begin stage ``index`` (from 1) of ``total``."""

    def task(self, title: str, total: int | None = None, unit: str = "tensors") -> ProgressTask:
        """Begin a task of ``total`` units (None: unknown)."""
        ...

    def message(self, text: str) -> None:
        """Show one line to the user."""


class _SilentTask:
    def advance(self, steps: int = 1, note: str = "") -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class SilentProgress:
    """Shows nothing."""

    def stage(self, index: int, total: int, title: str) -> None:
        """Nothing."""

    def task(self, title: str, total: int | None = None, unit: str = "tensors") -> ProgressTask:
        """A task that shows nothing."""
        return _SilentTask()

    def message(self, text: str) -> None:
        """Nothing."""
