"""Searches within a bound as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.cli.tables.layout import make_console, print_line, print_table
from compress.fits.figures import FINALISTS, PAID, finalist_rows, heading, paid_rows
from compress.tabular import Column


def print_fit(document: Mapping[str, Any]) -> None:
    """Print what each family gives up, what was left out and why, and the finalists."""
    console = make_console()
    print_line(console, heading(document), "bold")
    family, amount, *numbers = PAID
    columns: list[Column] = [family, (amount, "whole"), *((name, "right") for name in numbers)]
    print_table(console, None, columns, paid_rows(document))
    number, name, *numbers = FINALISTS
    columns = [(number, "right"), name, *((each, "right") for each in numbers)]
    print_table(console, None, columns, finalist_rows(document))
    for family, why in document["left_out"].items():
        print_line(console, f"{family} left out: {why}")
