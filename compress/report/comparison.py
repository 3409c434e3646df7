"""Several runs beside each other: what was measured, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import ReportError
from compress.report import figures
from compress.report.document import load


def find_report(path: Path) -> Path | None:
    """The report that a path names: the file, that of a run folder or of a sweep's trial, or of an output beside that."""
    places = [path, path / "report.json", path.with_name(f"{path.name}.run") / "report.json"]
    return next((place for place in places if place.is_file()), None)


def compare_runs(paths: Sequence[Path]) -> dict[str, Any]:
    """Compare runs by their reports.

    Returns:
        JSON values, schema ``compress.comparison/1``: ``runs`` (paths), ``status``, ``rows`` (name, the original's value where
        all have the same, a value and a change for each run), ``passes`` (their settings in each run, where these differ).

    Raises:
        ReportError: a path names no report.
    """
    reports = []
    for path in paths:
        if (place := find_report(path)) is None:
            raise ReportError("holds no report of a run", where=str(path), fix="`compress runs` lists run folders")
        reports.append(load(place))
    return {
        "schema": "compress.comparison/1",
        "runs": [str(path) for path in paths],
        "status": [report["status"] for report in reports],
        "rows": _rows(reports),
        "passes": _passes(reports),
    }


def _rows(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    tables = [{row.name: row for row in figures.before_after(report)} for report in reports]
    rows = []
    for name in dict.fromkeys(name for table in tables for name in table):
        cells = [table.get(name) for table in tables]
        before = {cell.before for cell in cells if cell is not None}
        rows.append(
            {
                "name": name,
                "original": before.pop() if len(before) == 1 else "",
                "values": ["" if cell is None else cell.after for cell in cells],
                "changes": ["" if cell is None else cell.change for cell in cells],
            }
        )
    return rows


def _passes(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings by pass, in the order of the longest recipe; passes that are the same in every run are left out."""
    listed = [[p for stage in report["stages"] for p in stage["passes"]] for report in reports]
    settings = [_numbered(passes) for passes in listed]
    names = dict.fromkeys(name for table in sorted(settings, key=len, reverse=True) for name in table)
    rows = [{"name": name, "settings": [table.get(name, "–") for table in settings]} for name in names]
    return [row for row in rows if len(set(row["settings"])) > 1]


def _numbered(passes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Changed settings by name of the pass; a second pass of a name has a number."""
    table: dict[str, str] = {}
    for row in passes:
        twice = sum(name.partition(" ")[0] == row["name"] for name in table)
        name = row["name"] if not twice else f"{row['name']} {twice + 1}"
        table[name] = figures.changed_settings(row["name"], row["settings"]) or "as by default"
    return table
