"""Tables and lines on stdout. A terminal gets lines of its width; a pipe gets them whole and without trailing blanks."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

from compress.cli.colour import shows_colour, styled
from compress.escape import printable
from compress.tabular import Column, TextTable

#: Style of a verdict or a status.
STYLES = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "yellow",
    "passed": "green",
    "failed": "bold red",
    "no gates": "dim",
}
#: Blanks between two columns, and the fewest where they do not fit; characters to which a column of sentences shrinks.
_GAP, _NARROW_GAP, _LEAST = 3, 2, 24
#: Before the columns that stand below the first one.
_INDENT = "   "


@dataclass(frozen=True)
class Styled:
    """A cell with a style, such as ``bold red``."""

    text: str
    style: str

    def __str__(self) -> str:
        return self.text


class Console:
    """Where tables and lines go. ``width``: characters of a line; in a pipe as many as it takes."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        terminal = stream.isatty()
        asked = os.environ.get("COLUMNS", "").isdecimal()
        self.width = shutil.get_terminal_size().columns if terminal or asked else sys.maxsize
        self.colour = shows_colour(stream)
        self._blank = False

    def write(self, line: str) -> None:
        """Write a line, but one empty line at most."""
        line = line.rstrip(" ")
        if line or not self._blank:
            self.stream.write(line + "\n")
        self._blank = not line

    def styled(self, text: str, style: str) -> str:
        """Text in a style, where the stream shows colours."""
        return styled(text, style) if self.colour else text


def make_console() -> Console:
    """A console on stdout."""
    return Console(sys.stdout)


def print_table(console: Console, title: str | None, columns: Sequence[Column], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table."""
    print_laid_out(console, TextTable(title or "", columns, [tuple(row) for row in rows]))


def print_laid_out(console: Console, table: TextTable) -> None:
    """Print a table between empty lines: numbers and names whole, sentences wrapped where the line is too short.

    Where that is not enough, the first column has lines of its own, and the others stand below it.
    """
    cells = [[printable(str(cell)) for cell in row] for row in table.rows]
    widths, gap = _widths(table, cells, console.width)
    stacked = 1 + sum(widths) + gap * (len(widths) - 1) > console.width and len(widths) > 1
    if stacked:
        rest = replace(table, columns=table.columns[1:], rows=[row[1:] for row in table.rows])
        widths, gap = _widths(rest, [row[1:] for row in cells], console.width - len(_INDENT))
        widths = [0, *widths]
    console.write("")
    if table.title:
        console.write(console.styled(printable(table.title), "bold"))
    _print_row(console, table.names, [[name] for name in table.names], widths, gap, table.kinds, stacked)
    console.write(
        " " + "─" * min(console.width - 2, sum(widths) + gap * (len(widths) - 1) + (len(_INDENT) if stacked else 0))
    )
    for row, texts in zip(table.rows, cells, strict=True):
        lines = [_lines(text, width, kind) for text, width, kind in zip(texts, widths, table.kinds, strict=True)]
        _print_row(console, row, lines, widths, gap, table.kinds, stacked)
    console.write("")


def _print_row(
    console: Console,
    row: Sequence[Any],
    lines: Sequence[Sequence[str]],
    widths: Sequence[int],
    gap: int,
    kinds: Sequence[str],
    stacked: bool,
) -> None:
    """Print the lines of each cell beside each other; with ``stacked`` those of the first cell above."""

    def part(i: int, number: int) -> str:
        text = lines[i][number] if number < len(lines[i]) else ""
        aligned = _aligned(text, widths[i], kinds[i])
        return aligned.replace(text, console.styled(text, row[i].style)) if isinstance(row[i], Styled) else aligned

    start = 1 if stacked else 0
    if stacked:
        for number in range(len(lines[0])):
            console.write(" " + part(0, number))
    for number in range(max(map(len, lines[start:]), default=0)):
        shown = (" " * gap).join(part(i, number) for i in range(start, len(widths)))
        if shown.strip():
            console.write((_INDENT if stacked else " ") + shown)


def _widths(table: TextTable, cells: Sequence[Sequence[str]], room: int) -> tuple[list[int], int]:
    """The width of each column, and the blanks between two."""
    natural = [
        max([_length(name), *(_length(line) for row in cells for line in row[i].split("\n"))])
        for i, name in enumerate(table.names)
    ]
    gap = _GAP if 1 + sum(natural) + _GAP * (len(natural) - 1) <= room else _NARROW_GAP
    over = 1 + sum(natural) + gap * (len(natural) - 1) - room
    wrapped = [i for i, kind in enumerate(table.kinds) if kind == "left"]
    least = {i: max([_LEAST, *(_length(word) for row in cells for word in row[i].split())]) for i in wrapped}
    while (
        over > 0
        and (widest := max((i for i in wrapped if natural[i] > least[i]), key=natural.__getitem__, default=None))
        is not None
    ):
        others = [natural[i] for i in wrapped if i != widest]
        step = max(1, min(over, natural[widest] - max([least[widest], *(n for n in others if n < natural[widest])])))
        natural[widest] -= step
        over -= step
    return natural, gap


def _lines(text: str, width: int, kind: str) -> list[str]:
    """The lines of a cell; only sentences are wrapped."""
    lines = text.split("\n")
    if kind != "left" or not width:
        return lines
    return [part for line in lines for part in (wrapped(line, width) if _length(line) > width else [line])]


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many characters, broken between words; a longer word stays whole. The first line's indent is kept."""
    indent = " " * (len(text) - len(text.lstrip(" ")))
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


def _aligned(text: str, width: int, kind: str) -> str:
    blanks = " " * max(0, width - _length(text))
    return blanks + text if kind == "right" else text + blanks


def _length(text: str) -> int:
    """Cells of a terminal that a text fills."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def print_line(console: Console, text: str, style: str = "", *, whole: bool = False) -> None:
    """Print a line. The terminal alone wraps ``whole`` lines, so that paths in them can be copied."""
    text = printable(text)
    for line in (
        text.split("\n") if whole else [part for one in text.split("\n") for part in wrapped(one, console.width)]
    ):
        console.write(console.styled(line, style))
