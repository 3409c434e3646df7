"""The result of a run, as Python code gets it: short at a prompt, tables in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.report import figures
from compress.tabular import Shown, TextTable


class RunReport(Shown, dict[str, Any]):
    """The report of a run: a dictionary of JSON values, schema ``compress.report/1``."""

    def headline(self) -> str:
        """Bytes before and after, the verdict, and the metric of the waterfall."""
        rows = {row.name: row for row in figures.before_after(self)}
        measured = [rows[name] for name in ("size", figures.headline(self).title) if name in rows]
        values = "; ".join(f"{row.name} {row.before} ▶ {row.after} ({row.change})" for row in measured)
        return f"{self['original']['checkpoint']} ▶ {self['output']}: {self['status']}; {values}"

    def tables(self) -> list[TextTable]:
        """Every measured quantity, then the gates."""
        head = [("", "whole"), ("before", "right"), ("after", "right"), ("change", "whole")]
        tables = [TextTable("", head, [(r.name, r.before, r.after, r.change) for r in figures.before_after(self)])]
        if self["gates"]:
            rows = [(gate["gate"], gate["verdict"], gate["text"]) for gate in self["gates"]]
            tables.append(TextTable("gates", ["gate", "verdict", ""], rows))
        return tables


@dataclass(frozen=True, repr=False)
class RunResult(Shown):
    """The result of a run.

    Attributes:
        checkpoint: the published output, or the last stage's folder where it was not published.
        report: the report's dictionary (schema ``compress.report/1``).
        verdict: ``passed``, ``failed``, ``inconclusive``, or ``no gates``.
        exit_status: exit status of the command line.
        published: whether the result is at the output. nothing_to_do: an earlier run of this recipe had published it.
    """

    checkpoint: Path
    report: RunReport
    verdict: str
    exit_status: int
    published: bool
    nothing_to_do: bool = False

    def headline(self) -> str:
        """The report's, and whether the result was published."""
        return self.report.headline() + ("" if self.published else "; not published")

    def tables(self) -> list[TextTable]:
        """Those of the report."""
        return self.report.tables()
