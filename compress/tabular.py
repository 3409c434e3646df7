"""Tables of text: what a notebook and a terminal show of a result. Nothing here prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from compress.escape import in_one_line, markdown, printable

#: A column's name, or its name and layout: ``right`` (numbers) or ``whole`` (never wrapped).
Column: TypeAlias = str | tuple[str, str]

#: Characters of a result at a prompt.
_REPR = 300


@dataclass(frozen=True)
class TextTable:
    """A table of text. ``title``: a line above it; empty for none. Every row has a cell for each column."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]

    def filled(self) -> TextTable:
        """Without the columns that are empty in every row; the first one stays."""
        kept = [i for i in range(len(self.columns)) if not i or any(str(row[i]) for row in self.rows)]
        rows = [tuple(row[i] for i in kept) for row in self.rows]
        return replace(self, columns=[self.columns[i] for i in kept], rows=rows)

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return [column if isinstance(column, str) else column[0] for column in self.columns]

    @property
    def kinds(self) -> list[str]:
        """The layout of each column: ``left`` (which may wrap), ``right`` or ``whole``."""
        return ["left" if isinstance(column, str) else column[1] for column in self.columns]

    def to_markdown(self) -> str:
        """The table in Markdown, with its title above it."""
        marks = ["--:" if kind == "right" else "---" for kind in self.kinds]
        rows = [[in_one_line(str(cell)).replace("|", "\\|") for cell in row] for row in (self.names, marks, *self.rows)]
        lines = [markdown(f"| {' | '.join(row)} |") for row in rows]
        return "\n".join([markdown(f"**{in_one_line(self.title)}**"), "", *lines] if self.title else lines)

    def to_html(self) -> str:
        """The table in HTML, with its title as its caption."""

        def row(cells: Iterable[Any], tag: str) -> str:
            aligned = zip(cells, self.kinds, strict=True)
            return "<tr>" + "".join(
                f'<{tag} style="text-align:{"right" if kind == "right" else "left"}">{_escaped(str(cell))}</{tag}>'
                for cell, kind in aligned
            ) + "</tr>"  # fmt: skip

        caption = f'<caption style="text-align:left">{_escaped(self.title)}</caption>' if self.title else ""
        body = "".join(row(cells, "td") for cells in self.rows)
        return f"<table>{caption}<thead>{row(self.names, 'th')}</thead><tbody>{body}</tbody></table>"


def _escaped(text: str) -> str:
    import html  # its table of entities is large, and a terminal needs none

    return html.escape(printable(text)).replace("\n", "<br>")


class Shown:
    """A result that a prompt shows as one line, and a notebook as a line and tables, in HTML or Markdown."""

    def headline(self) -> str:
        """The result in one line."""
        raise NotImplementedError

    def tables(self) -> list[TextTable]:
        """The result as tables; none by default."""
        return []

    def __repr__(self) -> str:
        text = f"<{type(self).__name__}: {in_one_line(self.headline())}>"
        return text if len(text) <= _REPR else text[: _REPR - 2] + "…>"

    def _repr_markdown_(self) -> str:
        parts = [markdown(in_one_line(self.headline())), *(table.to_markdown() for table in self.tables())]
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        return f"<p>{_escaped(self.headline())}</p>" + "".join(table.to_html() for table in self.tables())
