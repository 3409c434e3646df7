"""The command that renders a report again: report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress.cli.commands.common import say
from compress.errors import ReportError
from compress.files import disk_errors, expanded, write_atomically


def report(subject: str, output: Path | None) -> None:
    """``compress report``: render a run's report.json, by the suffix of the output file."""
    from compress import report as reports

    renderers: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
        ".html": reports.render_html,
        ".md": reports.render_markdown,
        ".svg": reports.render_main_picture,
        ".xml": reports.render_junit,
    }
    path = _report_of(expanded(subject))
    target = output if output is not None else path.with_suffix(".html")
    if target.suffix not in renderers:
        raise ReportError(
            f"a report is not written as `{target.suffix}`",
            where=str(target),
            fix=f"end it with {', '.join(renderers)}",
        )
    data = reports.load(path)
    with reports.judged(path):
        text = renderers[target.suffix](data)
    with disk_errors(target):
        write_atomically(target, text.encode())
    say(f"wrote {target}")


def _report_of(path: Path) -> Path:
    """The report.json that a path names: the file, its run folder, or the output beside that. Raises `ReportError`."""
    if path.is_file():
        return path
    places = [path / "report.json", path.with_name(f"{path.name}.run") / "report.json"]
    for place in places:
        if place.is_file():
            return place
    if not path.exists():
        raise ReportError("there is no such file or folder", where=str(path), fix="`compress runs` lists run folders")
    raise ReportError("holds no report.json", where=str(path), fix="name a run folder (OUTPUT.run) or a report.json")
