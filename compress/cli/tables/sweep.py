"""The front of a sweep as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.cli.tables.layout import STYLES, make_console, print_line, print_table
from compress.sweeps.figures import failures, front_cells, front_columns, notes, summary
from compress.tabular import Column

#: Columns of a terminal that have room for intervals.
_WIDE = 100
#: Reasons of failed trials that are shown.
_FAILED = 3


def print_sweep(document: Mapping[str, Any]) -> None:
    """Print the front, what became of the other trials, and where everything lies."""
    console = make_console()
    print_line(console, f"{document['model']} ▶ {document['folder']}", "bold", whole=True)
    print_line(console, summary(document), STYLES.get(document["status"], ""), whole=True)
    names, right = front_columns(document)
    columns: list[Column] = [(name, "right") if i in right else (name, "whole") for i, name in enumerate(names)]
    intervals = console.width >= _WIDE
    if rows := front_cells(document, intervals=intervals):
        print_table(console, None, columns, rows)
    for note in notes(document, intervals=intervals):
        print_line(console, note, "dim")
    reasons = failures(document)
    for line in reasons[:_FAILED]:
        print_line(console, line, "yellow", whole=True)
    if len(reasons) > _FAILED:
        print_line(console, f"… and {len(reasons) - _FAILED} more reasons; the page has every trial", "yellow")
    print_line(console, f"page: {document['folder']}/sweep.html (and .json)", "dim", whole=True)
    if document["front"]:
        print_line(console, f"recipes of the front: {document['folder']}/front/", whole=True)
