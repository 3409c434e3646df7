"""Searches within a bound as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.cli.tables.layout import make_console, print_line, print_table
from compress.formatting import format_bytes, ratio_of
from compress.tabular import Column


def print_fit(document: Mapping[str, Any]) -> None:
    """Print what each family gives up, what was left out and why, and the finalists."""
    console = make_console()
    before, bound = document["original"], document["bound"]
    print_line(console, f"{format_bytes(before)} ▶ at most {format_bytes(bound)}, {ratio_of(before, bound)}", "bold")
    rows = [
        (row["family"], _amount(row), format_bytes(row["bytes"]), f"{row['divergence']:.4f}")
        for row in document["paid"]
    ]
    print_table(console, None, ["family", ("gives up", "whole"), ("bytes", "right"), ("nats per token", "right")], rows)
    finalists = [
        (str(number), _words(row), f"{row['bits']:.2f}", f"{row['expected']:.4f}", f"{row['measured']:.4f}")
        for number, row in enumerate(document["finalists"], 1)
    ]
    head: list[Column] = [("", "right"), "finalist", ("bits", "right"), ("expected", "right"), ("measured", "right")]
    print_table(console, None, head, finalists)
    for family, why in document["left_out"].items():
        print_line(console, f"{family} left out: {why}")


def _amount(row: Mapping[str, Any]) -> str:
    amount = row["amount"]
    if row["family"] == "bits":
        return f"{amount:.2f} bits per weight"
    return f"{100 * amount:g} %" if isinstance(amount, float) else str(amount)


def _words(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{f}: {_amount({'family': f, 'amount': a})}" for f, a in row["choice"].items()) or "bits alone"
