"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compress.escape import in_one_line, markdown


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a Markdown table; columns in ``right`` are aligned right."""
    marks = ["--:" if i in right else "---" for i in range(len(head))]
    body = [[in_one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    return [markdown(f"| {' | '.join(row)} |") for row in (head, marks, *body)]
