"""Progress that is shown: bars in a terminal or a notebook, a line every ten seconds elsewhere.

Within ``with make_progress(…) as progress:`` a terminal also shows the stage at work, from the first moment on. What is done
stays as a line with ✓.
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import IO, Any, Protocol, Self

from compress.escape import in_one_line
from compress.formatting import format_bytes
from compress.progress import Progress, ProgressTask, SilentProgress

#: Seconds between two lines, without a terminal.
EVERY = 10.0
#: Redraws in a second; more would take time from the work.
_REDRAWS = 4


class ShownProgress(Progress, Protocol):
    """Progress that is shown while its context is open."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_progress(quiet: bool, stream: IO[str]) -> ShownProgress:
    """Progress for a stream: bars in a notebook or a terminal that can move its cursor, lines otherwise."""
    if quiet:
        return _Silent()
    if in_notebook():
        return _Drawn(None)
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return _Drawn(stream)
    return _Lines(stream)


def in_notebook() -> bool:
    """Whether this is a notebook that can draw bars."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    if shell is None or type(shell).__name__ != "ZMQInteractiveShell":
        return False
    from importlib.util import find_spec

    return find_spec("ipywidgets") is not None


def chosen(progress: Progress | bool | None) -> ShownProgress:
    """The progress that a function of the API was given.

    Args:
        progress: receives what happens. True: shown on stderr, or in the notebook. None: shown in a notebook alone.
    """
    if progress is None:
        progress = in_notebook()
    return make_progress(not progress, sys.stderr) if isinstance(progress, bool) else _Given(progress)


class _Unopened:
    """Progress without anything to open or close."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class _Silent(_Unopened, SilentProgress):
    pass


class _Given(_Unopened):
    """Somebody's own progress, which they open and close themselves."""

    def __init__(self, inner: Progress) -> None:
        self.stage, self.task, self.message = inner.stage, inner.task, inner.message


def _resident() -> int:
    """Resident bytes of this process; 0 if unknown."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


class _Lines(_Unopened):
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


class _LineTask(_Unopened):
    def __init__(self, progress: _Lines, title: str, total: int | None, unit: str) -> None:
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


class _Drawn:
    """Bars drawn by rich, which is imported when it is opened or with the first bar, and obeys NO_COLOR.

    Args:
        stream: of a terminal; None for a notebook.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self.stream = stream
        self._console: Any = None
        self._bars: Any = None
        self._opened = 0
        self._status: Any = None

    @property
    def console(self) -> Any:
        if self._console is None:
            from rich.console import Console

            where = {"force_jupyter": True} if self.stream is None else {"file": self.stream}
            self._console = Console(**where, highlight=False, emoji=False)
        return self._console

    @property
    def bars(self) -> Any:
        """The bars, which are drawn while they are opened at least once."""
        if self._bars is None:
            self._bars = _make_bars(self.console)
        return self._bars

    def open(self) -> None:
        """Draw from now on."""
        self._opened += 1
        if self._opened == 1:
            self.bars.start()

    def close(self) -> None:
        """Draw no longer, if nobody else still does."""
        self._opened -= 1
        if self._opened == 0:
            self.bars.stop()

    def __enter__(self) -> Self:
        self._status = self.bars.add_task("starting", total=None, kind="status", unit="", memory="", note="")
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.remove_task(self._status)
        self._status = None
        self.close()

    def stage(self, index: int, total: int, title: str) -> None:
        text = in_one_line(f"[{index}/{total}] {title}")
        if self._status is None:
            self.console.print(text, style="bold", markup=False)
        else:
            self.bars.reset(self._status, description=text)

    def task(self, title: str, total: int | None = None, unit: str = "tensors") -> ProgressTask:
        return _DrawnTask(self, title, total, unit)

    def message(self, text: str) -> None:
        style = "green" if text.startswith("✓") else "dim"
        self.console.print(in_one_line(text), style=style, markup=False)


class _DrawnTask:
    def __init__(self, progress: _Drawn, title: str, total: int | None, unit: str) -> None:
        self.progress = progress
        self.title, self.fields = in_one_line(title), {"total": total, "unit": unit}
        self.id: Any = None

    def advance(self, steps: int = 1, note: str = "") -> None:
        fields: dict[str, Any] = {"memory": format_bytes(_resident())} | ({"note": in_one_line(note)} if note else {})
        self.progress.bars.update(self.id, advance=steps, **fields)

    def __enter__(self) -> Self:
        self.id = self.progress.bars.add_task(self.title, kind="task", memory="", note="", **self.fields)
        self.progress.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.id is not None:
            self.progress.bars.refresh()
            self.progress.bars.remove_task(self.id)
        self.progress.close()


def _make_bars(console: Any) -> Any:
    """The stage at work as a line of its own with the time it has taken, below it the bars of its tasks."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    stage = (SpinnerColumn(), TextColumn("{task.description}", markup=False, style="bold"), TimeElapsedColumn())
    task = (
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
    )

    class Bars(Progress):
        def get_renderables(self) -> Any:
            for kind, columns, expand in (("status", stage, False), ("task", task, True)):
                self.columns, self.expand = columns, expand
                if tasks := [each for each in self.tasks if each.fields["kind"] == kind]:
                    yield self.make_tasks_table(tasks)

    return Bars(*task, console=console, transient=True, expand=True, redirect_stdout=False, refresh_per_second=_REDRAWS)
