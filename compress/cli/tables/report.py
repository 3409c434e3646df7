"""Reports, gates and evaluations as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.cli.tables.layout import STYLES, Styled, make_console, print_line, print_table
from compress.formatting import fixed, format_bytes, signed, signed_percent
from compress.tabular import Column


def print_report(report: Mapping[str, Any]) -> None:
    """Print before ▶ after, the waterfall of passes, the gates, and the paths of report and output."""
    from compress.report import figures
    from compress.report.experts import cold_experts

    console = make_console()
    print_line(console, f"{report['original']['checkpoint']} ▶ {report['output']}", "bold", whole=True)
    print_line(console, figures.verdict_text(report), STYLES.get(report["status"], ""), whole=True)
    print_table(
        console,
        None,
        [("", "whole"), ("before", "right"), ("after", "right"), "change"],
        [(r.name, r.before, r.after, r.change) for r in figures.before_after(report)],
    )
    for sentence in figures.row_notes(report):
        print_line(console, sentence, "dim")
    _print_positions(console, report["result"])
    _print_lengths(console, report["original"], report["result"])
    rows: list[tuple[str, ...]] = []
    shown = figures.headline(report)
    for step in figures.waterfall(report):
        rows.append(
            (
                step.name,
                step.settings,
                format_bytes(step.bytes),
                figures.signed_bytes(step.saved),
                figures.bar(step, 12),
                *figures.headline_cells(shown, step),
            )
        )
    head: list[Column] = ["pass", "settings", ("size", "right"), ("saved", "right"), ("left", "whole")]
    measured = any(row[5] for row in rows)
    if measured:
        head += [(shown.title, "right"), ("cost", "right")]
    if console.width < 100:  # settings need a line of their own to be readable
        rows = [(f"{r[0]}\n  {r[1]}" if r[1] else r[0], *r[2:]) for r in rows]
        head.remove("settings")
    print_table(console, None, head, [row if measured else row[:-2] for row in rows])
    print_line(console, figures.BARS, "dim")
    if report["gates"]:
        _print_gates(report["gates"], console)
    if (note := figures.quality_note(report)) is not None:
        print_line(console, f"measured on {note}", "dim")
    for note in filter(None, [figures.speed_note(report), *cold_experts(report), *report["notes"]]):
        warns = " did not help: " in note
        copied = any(mark in note for mark in ("pip install", "/", "`"))  # commands and paths are not broken
        print_line(console, note, "yellow" if warns else "dim", whole=warns or copied)
    print_line(console, f"report: {report['run_folder']}/report.html (and .md, .json)", "dim", whole=True)
    if report["published"]:
        print_line(console, f"output: {report['output']}", whole=True)
    _print_verdict(report["gates"], report["status"], console)


def _print_lengths(console: Any, original: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Print the cost by length of the prompt, where it was measured."""
    from compress.report.lengths import HEAD, length_cells, length_notes

    if rows := length_cells(original, result):
        kinds = ("right", "whole", "right", "right", "whole", "whole")
        print_table(console, None, list(zip(HEAD, kinds, strict=True)), rows)
    for note in length_notes(original, result):
        print_line(console, note)


def _print_positions(console: Any, result: Mapping[str, Any]) -> None:
    """Print the loss by position in the window, where it was measured."""
    from compress.report import figures

    if rows := figures.position_rows(result):
        head = figures.position_head(result)
        # a narrow terminal has no room for all of a comparison
        shown = [i for i, name in enumerate(head) if console.width >= 100 or name not in ("tokens", "nats per token")]
        columns: list[Column] = [(head[0], "whole"), *((head[i], "right") for i in shown[1:])]
        print_table(console, "loss by position", columns, [[row[i] for i in shown] for row in rows])


def print_gates(gates: Sequence[Mapping[str, Any]], status: str) -> None:
    """Print a row per gate, then the verdict."""
    console = make_console()
    _print_gates(gates, console)
    _print_verdict(gates, status, console)


def _print_gates(gates: Sequence[Mapping[str, Any]], console: Any) -> None:
    rows = [
        (Styled(g["verdict"].upper() if g["verdict"] != "pass" else "pass", STYLES[g["verdict"]]), g["gate"], g["text"])
        for g in gates
    ]
    if rows:
        print_table(console, None, [("gate", "whole"), ("", "whole"), ""], rows)


def _print_verdict(gates: Sequence[Mapping[str, Any]], status: str, console: Any) -> None:
    idle = "" if status == "no gates" else f"no gates, and a training that did not help: {status}"
    print_line(console, f"gates: {status}" if gates else idle or status, STYLES.get(status, ""))


def print_evaluation(document: Mapping[str, Any]) -> None:
    """Print the result of ``eval``, beside the baseline if there is one."""
    from compress.report import figures

    console = make_console()
    baseline = document.get("baseline")
    if baseline is not None:
        print_line(console, f"{baseline['checkpoint']} ▶ {document['checkpoint']}", "bold")
        rows = figures.before_after({"original": baseline, "result": document})
        print_table(
            console,
            None,
            [("", "whole"), ("baseline", "right"), ("this", "right"), "change"],
            [(r.name, r.before, r.after, r.change) for r in rows],
        )
        _print_paired(console, document.get("paired"))
    else:
        print_line(console, document["checkpoint"], "bold")
        rows = figures.before_after({"original": document, "result": document})
        print_table(console, None, [("", "whole"), ("", "right")], [(r.name, r.after) for r in rows])
    _print_positions(console, document)
    if baseline is not None:
        _print_lengths(console, baseline, document)
    settings, evaluation = document["settings"], document["evaluation"]
    if evaluation is not None:
        files = settings["files"] or [settings["images"]]
        note = figures.quality_note({"result": document, "data": {"evaluation": {"files": files}}})
        print_line(console, f"measured on {note}", "dim")
    if (note := figures.speed_note({"result": document})) is not None:
        print_line(console, note, "dim")


def _print_paired(console: Any, paired: Mapping[str, Any] | None) -> None:
    from compress.evaluation import metrics

    if not paired:
        return
    for name, metric in metrics.table().items():
        p = paired.get(name, {})
        if "drop" in p:
            text = f"drops by {fixed(p['drop'], 2)} points (between {fixed(p['lower'], 2)} and {fixed(p['upper'], 2)}"
        elif "increase" in p:
            text = f"{signed_percent(p['increase'])} (between {signed_percent(p['lower'])} and {signed_percent(p['upper'])}"
        elif "nats" in p:
            text = f"{signed(p['nats'], 4)} nats (between {signed(p['lower'], 4)} and {signed(p['upper'], 4)}"
        else:  # it compares with the original itself
            continue
        units = f"{p.get('units', paired['units'])} {p.get('unit', paired['unit'])}s"
        settings = f"each at {paired['confidence']:.4g} confidence, {units}"
        print_line(console, f"{metric.title} {text}, {settings})")
