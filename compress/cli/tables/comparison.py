"""Several runs beside each other as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.cli.tables.layout import make_console, print_line, print_table
from compress.tabular import Column


def print_comparison(data: Mapping[str, Any]) -> None:
    """Print the runs by letter, what was measured of each, and the settings that differ."""
    console = make_console()
    letters = [_letter(number) for number in range(len(data["runs"]))]
    for letter, run, status in zip(letters, data["runs"], data["status"], strict=True):
        print_line(console, f"{letter}  {run}: {status}", whole=True)
    columns: list[Column] = [("", "whole"), ("original", "right"), *((letter, "right") for letter in letters)]
    print_table(console, None, columns, [(row["name"], row["original"], *row["values"]) for row in data["rows"]])
    if data["passes"]:
        head: list[Column] = [("pass", "whole"), *letters]
        print_table(console, "settings that differ", head, [(row["name"], *row["settings"]) for row in data["passes"]])


def _letter(number: int) -> str:
    """A, B, …, Z, A1, …"""
    return chr(65 + number % 26) + (str(number // 26) if number >= 26 else "")
