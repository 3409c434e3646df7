"""Consoles, tables and lines. rich lays them out; it is imported when something is printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from compress.escape import printable

#: Style of a verdict or a status.
STYLES = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "yellow",
    "passed": "green",
    "failed": "bold red",
    "no gates": "dim",
}


#: A column's name, or its name and layout: ``right`` (numbers) or ``whole`` (never wrapped).
Column: TypeAlias = str | tuple[str, str]


def make_console() -> Any:
    """A console on stdout without highlighting."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False, emoji=False)


def print_table(console: Any, title: str | None, columns: Sequence[Column], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for column in columns:
        name, kind = column if isinstance(column, tuple) else (column, "left")
        if kind == "right":
            table.add_column(name, justify="right", no_wrap=True)
        elif kind == "whole":
            table.add_column(name, no_wrap=True)
        else:
            table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(printable(str(cell))) for cell in row))
    console.print(table)


def print_line(console: Any, text: str, style: str = "", *, whole: bool = False) -> None:
    """Print a line. The terminal alone wraps ``whole`` lines, so that paths in them can be copied."""
    console.print(printable(text), style=style, markup=False, soft_wrap=whole)
