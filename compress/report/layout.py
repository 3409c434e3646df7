"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compress.tabular import Column, TextTable


def filled(
    head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()
) -> tuple[list[str], list[list[str]], list[int]]:
    """Head, rows and columns that are aligned right, without columns that are empty in every row."""
    rows = list(rows)
    kept = [i for i in range(len(head)) if not rows or any(row[i] for row in rows)]
    return (
        [head[i] for i in kept],
        [[row[i] for i in kept] for row in rows],
        [kept.index(i) for i in right if i in kept],
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a Markdown table without empty columns; columns in ``right`` are aligned right."""
    head, rows, right = filled(head, rows, right)
    columns: list[Column] = [(name, "right") if i in right else name for i, name in enumerate(head)]
    return TextTable("", columns, rows).to_markdown().split("\n")
