"""Reports as Markdown, for people and for the job summary of GitHub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from compress.escape import in_one_line, markdown
from compress.formatting import fixed, format_bytes
from compress.report import figures
from compress.report.details import render_details
from compress.report.layout import table
from compress.report.lengths import HEAD, length_cells, length_notes
from compress.report.pictures import LENGTHS_FILE

MARKS = {"pass": "✅ pass", "fail": "❌ FAIL", "inconclusive": "❔ inconclusive"}


def render_markdown(report: Mapping[str, Any]) -> str:
    """Return the whole report as Markdown."""
    lines = [
        in_one_line(f"# {report['original']['checkpoint']} ▶ {report['output']}"),
        "",
        f"**{figures.verdict_text(report)}**",
        "",
        *before_after_table(report, timed=True),
        "",
        *(f"- {note}" for note in figures.row_notes(report)),
        "",
    ]
    lines += _lengths(report)
    if report["gates"]:
        lines += ["## Gates", "", *gates_table(report["gates"]), ""]
    if rows := figures.position_rows(report["result"]):
        head = figures.position_head(report["result"])
        lines += ["## Loss by position", "", *table(head, rows, right=(1, 2, 3)), ""]
    lines += [
        "## Bytes saved and quality lost by each pass",
        "",
        *waterfall_table(report, seconds=True),
        "",
        figures.BARS,
        "",
    ]
    detailed = [row for stage in report["stages"] for row in stage["passes"] if row["details"]]
    if detailed:
        lines += ["## Details of the passes", ""]
    for row in detailed:
        lines += render_details(row, figures.losses_file(report, row))
    lines += ["## Planned and written bytes", "", *table(("pass", "planned", "written", ""), planned_rows(report)), ""]
    lines += ["## How it was measured", "", *(in_one_line(f"- {note}") for note in notes(report)), ""]
    return "\n".join(map(markdown, lines))


def _lengths(report: Mapping[str, Any]) -> list[str]:
    """The section on cost by length of the prompt; empty where no lengths were measured."""
    sides = report["original"], report["result"]
    rows, notes = length_cells(*sides), length_notes(*sides)
    if not rows and not notes:
        return []
    lines = ["## Cost by length of the prompt", ""]
    if rows:
        lines += [*table(HEAD, rows, right=(2, 3)), ""]
        lines += [f"![prefill and cache against length]({LENGTHS_FILE})", ""]
    return [*lines, *(in_one_line(f"- {note}") for note in notes), ""]


def notes(report: Mapping[str, Any]) -> list[str]:
    """Sentences on how the run was measured."""
    machine = report["machine"]
    sentences = (
        figures.quality_note(report),
        figures.speed_note(report),
        f"{machine['cpu']}, {machine['cores']} cores, device {machine['device']}",
        ", ".join(f"{k} {v}" for k, v in report["versions"].items()),
        f"{report['started']}, {report['seconds']:.0f} s",
        *report["notes"],
    )
    return [sentence for sentence in sentences if sentence]


def before_after_table(report: Mapping[str, Any], *, timed: bool) -> list[str]:
    """Table of every measured quantity: before, after, change. ``timed``: with times and memory."""
    rows = [row for row in figures.before_after(report) if timed or not row.timed]
    return table(("", "before", "after", "change"), ((r.name, r.before, r.after, r.change) for r in rows), right=(1, 2))


def gates_table(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Table of gates: verdict and reason."""
    return table(("gate", "verdict", ""), ((f"`{g['gate']}`", MARKS[g["verdict"]], g["text"]) for g in gates))


def waterfall_table(report: Mapping[str, Any], *, seconds: bool) -> list[str]:
    """Table with a row per pass. ``seconds``: with the time of each."""
    columns = slice(None) if seconds else slice(-1)
    rows = [row[columns] for row in waterfall_cells(report)]
    return table(waterfall_head(report)[columns], rows, right=(1, 2, 4, 5, 6, 7))


def waterfall_head(report: Mapping[str, Any]) -> list[str]:
    """Head of `waterfall_cells`."""
    return ["pass", "size", "saved", "of the original", figures.headline(report).title, "cost", "KL", "seconds"]


def waterfall_cells(report: Mapping[str, Any]) -> Iterable[list[str]]:
    """A row per pass: size, bytes saved, a bar of the remaining bytes, headline metric, KL, seconds."""
    shown = figures.headline(report)
    for step in figures.waterfall(report):
        named = f"`{step.name}`" + (f" {step.settings}" if step.settings else "")
        yield [
            named if step.saved or step.settings else step.name,
            format_bytes(step.bytes),
            figures.signed_bytes(step.saved),
            f"`{figures.bar(step, 20)}`",
            *figures.headline_cells(shown, step),
            "" if step.kl is None else fixed(step.kl, 4),
            _seconds(step),
        ]


def _seconds(step: figures.Step) -> str:
    if step.seconds is None:
        return ""
    notes = [f"predicted {step.predicted:.0f}"] if step.predicted is not None and step.predicted >= 1 else []
    notes += ["reused"] if step.reused else []
    return f"{step.seconds:.1f}" + (f" ({', '.join(notes)})" if notes else "")


def planned_rows(report: Mapping[str, Any]) -> Iterable[Sequence[str]]:
    """A row per pass: planned and written bytes, and whether they are equal."""
    for stage in report["stages"]:
        for row in stage["passes"]:
            planned, actual = row["planned"]["bytes"], row["actual"]["bytes"]
            equal = "equal" if planned == actual else "estimate" if not row["exact"] else "NOT EQUAL"
            yield f"`{row['name']}`", f"{planned:,}", f"{actual:,}", equal


def append_step_summary(report: Mapping[str, Any]) -> bool:
    """Append the Markdown to the file named by ``$GITHUB_STEP_SUMMARY``, if set. Returns whether it was appended."""
    return _append(lambda: render_markdown(report))


def append_gates_summary(subject: str, gates: Sequence[Mapping[str, Any]], status: str) -> bool:
    """Append the gates of a subject to the file named by ``$GITHUB_STEP_SUMMARY``, if set. Returns whether it was appended."""
    head = in_one_line(f"# {subject}: gates {status}")
    return _append(lambda: "\n".join([markdown(head), "", *gates_table(gates), ""]))


def _append(text: Callable[[], str]) -> bool:
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return False
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text() + "\n")
    except OSError:  # a finished run must not fail for its summary
        return False
    return True
