"""How long work tells that it is alive. The terminal's version is in `compress.cli`; nothing here prints."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self


class ProgressTask(Protocol):
    """A running piece of work; a context manager."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """``steps`` more units are done; ``note`` names the current one (a tensor, a document)."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Progress(Protocol):
    """Where passes, evaluation and the writer report what they are doing."""

    def stage(self, index: int, total: int, title: str) -> None:
        """Stage ``index`` (from 1) of ``total`` begins."""

    def task(self, title: str, total: int | None = None, unit: str = "tensors") -> ProgressTask:
        """Begin a piece of work of ``total`` units (None: unknown)."""
        ...

    def message(self, text: str) -> None:
        """One line for the user."""


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
    """Says nothing; the default of the Python API."""

    def stage(self, index: int, total: int, title: str) -> None:
        """Nothing."""

    def task(self, title: str, total: int | None = None, unit: str = "tensors") -> ProgressTask:
        """A task that says nothing."""
        return _SilentTask()

    def message(self, text: str) -> None:
        """Nothing."""
