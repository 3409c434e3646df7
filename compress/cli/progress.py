"""Progress on stderr: bars in a terminal, a line every ten seconds elsewhere, nothing with ``--quiet``."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import IO, Any, Self

from compress.escape import in_one_line
from compress.formatting import format_bytes
from compress.progress import Progress, ProgressTask, SilentProgress

#: Seconds between two lines, without a terminal.
EVERY = 10.0


def make_progress(quiet: bool, stream: IO[str]) -> Progress:
    """Progress for a stream: bars in a terminal that can move its cursor, lines otherwise."""
    if quiet:
        return SilentProgress()
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return _TerminalProgress(stream)
    return _LineProgress(stream)


def _resident() -> int:
    """Resident bytes of this process; 0 if unknown."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


class _LineProgress:
    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def line(self, text: str) -> None:
        self.stream.write(in_one_line(text) + "\n")
        self.stream.flush()

    def stage(self, index: int, total: int, title: str) -> None:
        self.line(f"[{index}/{total}] {title}")

    def task(self, title: str, total: int | None = None, unit: str = "tensors") -> ProgressTask:
        return _LineTask(self, title, total, unit)

    def message(self, text: str) -> None:
        self.line(text)


class _LineTask:
    def __init__(self, progress: _LineProgress, title: str, total: int | None, unit: str) -> None:
        self.progress, self.title, self.total, self.unit = progress, title, total, unit
        self.done, self.note = 0, ""
        self.started = self.shown = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done, self.note = self.done + steps, note or self.note
        now = time.monotonic()
        if now - self.shown < EVERY:
            return
        self.shown = now
        of = f"/{self.total}" if self.total is not None else ""
        left = ""
        if self.total is not None and self.done:
            left = f", {(now - self.started) * (self.total - self.done) / self.done:.0f} s left"
        note = f", {self.note}" if self.note else ""
        memory = format_bytes(_resident())
        self.progress.line(f"  {self.title}: {self.done}{of} {self.unit}{left}, {memory} resident{note}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class _TerminalProgress:
    """Bars drawn by rich, which is imported with the first bar and obeys NO_COLOR."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self._console: Any = None

    @property
    def console(self) -> Any:
        if self._console is None:
            from rich.console import Console

            self._console = Console(file=self.stream, highlight=False, emoji=False)
        return self._console

    def stage(self, index: int, total: int, title: str) -> None:
        self.console.print(in_one_line(f"[{index}/{total}] {title}"), style="bold", markup=False)

    def task(self, title: str, total: int | None = None, unit: str = "tensors") -> ProgressTask:
        return _TerminalTask(self, title, total, unit)

    def message(self, text: str) -> None:
        self.console.print(in_one_line(text), style="dim", markup=False)


class _TerminalTask:
    def __init__(self, progress: _TerminalProgress, title: str, total: int | None, unit: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
        from rich.table import Column

        self.bars = Bars(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}", markup=False),
            TextColumn(
                "{task.fields[note]}",
                markup=False,
                style="dim",
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=progress.console,
            transient=True,
            expand=True,
        )
        self.id = self.bars.add_task(in_one_line(title), total=total, unit=unit, memory="", note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        fields: dict[str, Any] = {"memory": format_bytes(_resident())} | ({"note": in_one_line(note)} if note else {})
        self.bars.update(self.id, advance=steps, **fields)

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()
