"""Rows of text on a search. The command and the page use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.formatting import format_bytes, ratio_of

PAID = ("family", "gives up", "bytes", "nats per token")
FINALISTS = ("", "finalist", "bits", "expected", "measured")
TRIALS = ("family", "gives up", "bytes", "nats per token")


def heading(document: Mapping[str, Any]) -> str:
    """The bound, in one line."""
    before, bound = document["original"], document["bound"]
    return f"{format_bytes(before)} ▶ at most {format_bytes(bound)}, {ratio_of(before, bound)}"


def paid_rows(document: Mapping[str, Any]) -> list[Sequence[str]]:
    """Amount, spared bytes and divergence of each family of the best combination."""
    return [
        (row["family"], _amount(row["family"], row["amount"]), format_bytes(row["bytes"]), f"{row['divergence']:.4f}")
        for row in document["paid"]
    ]


def finalist_rows(document: Mapping[str, Any]) -> list[Sequence[str]]:
    """The finalists, the best first: expected and measured nats per token."""
    return [
        (str(number), _words(row), f"{row['bits']:.2f}", f"{row['expected']:.4f}", f"{row['measured']:.4f}")
        for number, row in enumerate(document["finalists"], 1)
    ]


def trial_rows(document: Mapping[str, Any]) -> list[Sequence[str]]:
    """Each family alone: its amounts, the bytes that remain, and nats per token."""
    rows = {"bits": document["bits"], **document["families"]}
    return [
        (family, _amount(family, amount), format_bytes(size), f"{cost:.4f}")
        for family, amounts in rows.items()
        for amount, cost, size in amounts
    ]


def _amount(family: str, amount: Any) -> str:
    if family in ("bits", "trellis") and isinstance(amount, float):
        return f"{amount:.2f} bits per weight"
    return f"{100 * amount:g} %" if isinstance(amount, float) else str(amount)


def _words(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{family}: {_amount(family, amount)}" for family, amount in row["choice"].items()) or "bits alone"
