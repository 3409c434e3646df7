"""The report as Markdown, for people and for GitHub's job summary."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compress.escape import in_one_line, markdown
from compress.report import figures
from compress.report.experts import TIMES, expert_rows
from compress.settings import format_bytes

MARKS = {"pass": "✅ pass", "fail": "❌ FAIL", "inconclusive": "❔ inconclusive"}
_HEADLINES = {
    "passed": "every gate passed",
    "failed": "a gate FAILED",
    "inconclusive": "a gate is INCONCLUSIVE",
    "no gates": "no gates",
}


def render_markdown(report: Mapping[str, Any]) -> str:
    """The whole report."""
    before, after = (report[side]["size"]["bytes"] for side in ("original", "result"))
    headline = _HEADLINES[report["status"]]
    if report["status"] == "inconclusive" and not report["gates"]:
        headline = "a training did NOT HELP"
    lines = [
        in_one_line(f"# {report['original']['checkpoint']} ▶ {report['output']}"),
        "",
        f"**{format_bytes(before)} ▶ {format_bytes(after)}, {headline}**"
        + ("" if report["published"] else "; not published"),
        "",
        *before_after_table(report, timed=True),
        "",
    ]
    if report["gates"]:
        lines += ["## Gates", "", *gates_table(report["gates"]), ""]
    lines += ["## What each pass saved and cost", "", *waterfall_table(report, seconds=True), ""]
    said = [row for stage in report["stages"] for row in stage["passes"] if row["details"]]
    if said:
        lines += ["## What the passes say", ""]
    for row in said:
        details = {
            k: v
            for k, v in row["details"].items()
            if k not in ("blocks", "experts", "formats", "curve", "shapes", "sharing", "training", "widths")
        }
        if details:
            lines += [in_one_line(f"- `{row['name']}`: {_details(details)}"), ""]
        if "training" in row["details"]:
            lines += [*_training(row["details"]["training"], row["name"], figures.losses_file(report, row)), ""]
        if formats := figures.format_rows(row["details"]):
            text = "Divergence: nats per token expected of rounding those matrices alone, to second order."
            lines += [f"`{row['name']}`, formats within the budget. {text}", ""]
            lines += [*table(("format", "matrices", "divergence"), formats, right=(1, 2)), ""]
            curve = [(f"{bits:g}", f"{loss:.5f}") for bits, loss in row["details"]["curve"]]
            lines += ["What other budgets would cost:", "", *table(("bits", "divergence"), curve, right=(0, 1)), ""]
        if shapes := figures.shape_rows(row["details"]):
            columns = ("blocks that go", "heads", "neurons", "parameters", "size", "prefill", "divergence", "")
            text = (
                "Prefill: time for a prompt over the original's, where that is the target. Divergence from the original on "
                "calibration samples held out, after least squares and without tuning."
            )
            lines += [f"`{row['name']}`, shapes that meet the target. {text}", ""]
            lines += [*table(columns, shapes, right=(1, 2, 3, 4, 5, 6)), ""]
        if (lost := figures.sharing_error(row["details"])) is not None:
            lines += [f"- `{row['name']}`: shared matrices lose {lost:.1%} of their outputs' energy, in the mean", ""]
        if tried := figures.sharing_rows(row["details"]):
            text = "Divergence from the original on calibration samples held out."
            lines += [f"`{row['name']}`, which blocks share. {text}", ""]
            lines += [*table(("arrangement", "blocks", "divergence", ""), tried, right=(2,)), ""]
        if cold := expert_rows(row["details"]):
            names = ("block", "experts", "which", "fewest tokens of another", "tokens read", "would reach them")
            text = (
                "Experts that no calibration token reached: nothing but their weights told what to do with them. Of experts "
                f"so rare that none of N tokens shows them, {TIMES} N tokens reach most."
            )
            lines += [f"`{row['name']}`. {text}", "", *table(names, cold, right=(0, 3, 4, 5)), ""]
        if blocks := figures.block_rows(row["details"]):
            head = (
                "block",
                "layers",
                "sparsity, units, format or rank",
                "mean error",
                "worst layer",
                "after tuning",
                "seconds",
            )
            text = "Relative error of each layer's output; of the block's output where it was tuned."
            lines += [f"`{row['name']}`, block by block. {text}", "", *table(head, blocks, right=(0, 1, 2, 3, 6)), ""]
    lines += ["## Planned and written bytes", "", *table(("pass", "planned", "written", ""), _planned(report)), ""]
    machine = report["machine"]
    notes = [
        note
        for note in (
            figures.quality_note(report),
            figures.speed_note(report),
            f"{machine['cpu']}, {machine['cores']} cores, device {machine['device']}",
            ", ".join(f"{k} {v}" for k, v in report["versions"].items()),
            f"{report['started']}, {report['seconds']:.0f} s",
            *report["notes"],
        )
        if note
    ]
    lines += ["## How it was measured", "", *(in_one_line(f"- {note}") for note in notes), ""]
    return "\n".join(map(markdown, lines))


def before_after_table(report: Mapping[str, Any], *, timed: bool) -> list[str]:
    """Quantity, before, after, change."""
    rows = [row for row in figures.before_after(report) if timed or not row.timed]
    return table(("", "before", "after", "change"), ((r.name, r.before, r.after, r.change) for r in rows), right=(1, 2))


def gates_table(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Gate, verdict, reason."""
    return table(("gate", "verdict", ""), ((f"`{g['gate']}`", MARKS[g["verdict"]], g["text"]) for g in gates))


def waterfall_table(report: Mapping[str, Any], *, seconds: bool) -> list[str]:
    """One line per pass, with a bar of what is left of the original's bytes."""
    steps, shown = figures.waterfall(report), figures.headline(report)
    rows = []
    for step in steps:
        row = [
            f"`{step.name}`" + (f" {step.settings}" if step.settings else "")
            if step.saved or step.settings
            else step.name,
            format_bytes(step.bytes),
            figures.signed_bytes(step.saved),
            f"`{figures.bar(step, 20)}`",
            *figures.headline_cells(shown, step),
            "" if step.kl is None else f"{step.kl:.4f}",
        ]
        if seconds:
            row.append("" if step.seconds is None else f"{step.seconds:.1f}" + (" (reused)" if step.reused else ""))
        rows.append(row)
    head = [
        "pass",
        "size",
        "saved",
        "of the original",
        shown.title,
        "cost",
        "KL",
        *(["seconds"] if seconds else []),
    ]
    return table(head, rows, right=(1, 2, 4, 5, 6, 7))


def _training(training: Mapping[str, Any], name: str, picture: str) -> list[str]:
    """What a training did, its held-out losses, and where they are drawn."""
    held, of = training["held_out"], training.get("of", "tokens")
    text = (
        f"`{name}`, training: {training['tokens']:,} {of} in {training['steps']:,} steps, {training['epochs']:g} times "
        f"through the data, {training['tokens_per_second']:,.0f} {of} per second. Held-out loss {held[0]['loss']:.4f} ▶ "
        f"{min(row['loss'] for row in held):.4f}, best at step {training['best_step']}."
    )
    if "rate" in training:
        text += f" Peak learning rate {training['rate']:.3g}."
    if training["stopped"]:
        text += f" Stopped early: {training['stopped']}."
    if training.get("kept"):
        kept = markdown(", ".join(f"`{name}`" for name in training["kept"]))
        text += f" Kept as in the input, being none of the model's weights: {kept}."
    if "teacher_cache" in training:
        cache = training["teacher_cache"]
        text += (
            f" Teachers were read from a cache of {cache['k']} tokens, {cache['bytes_per_token']} bytes per token; "
            f"{cache['samples_added']:,} samples were added to it."
        )
    names = [key for key in training["losses"][-1] if key not in ("step", "loss")] if training["losses"] else []
    by_step = {row["step"]: row for row in training["losses"]}
    rows = []
    for row in held:
        mean = by_step.get(row["step"], {})
        shown = [f"{mean[key]:.4f}" if key in mean else "" for key in names]
        rows.append([f"{row['step']:,}", f"{row['loss']:.4f}", *shown])
    head = ("step", "held out", *(f"{key}, trained on" for key in names))
    return [text, "", f"![losses by step]({picture})", "", *table(head, rows, right=range(len(head)))]


def _planned(report: Mapping[str, Any]) -> Iterable[Sequence[str]]:
    for stage in report["stages"]:
        for row in stage["passes"]:
            planned, actual = row["planned"]["bytes"], row["actual"]["bytes"]
            equal = "equal" if planned == actual else "estimate" if not row["exact"] else "NOT EQUAL"
            yield f"`{row['name']}`", f"{planned:,}", f"{actual:,}", equal


def _details(details: Mapping[str, Any]) -> str:
    return "; ".join(f"{key}: {_short(value)}" for key, value in details.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        shown = [f"{k} {_short(v)}" for k, v in list(value.items())[:12]]
        return ", ".join(shown) + (" …" if len(value) > 12 else "")
    if isinstance(value, (list, tuple)):
        return ", ".join(_short(v) for v in value[:32]) + (" …" if len(value) > 32 else "")
    return str(value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a Markdown table; columns in ``right`` are aligned right."""
    marks = ["--:" if i in right else "---" for i in range(len(head))]
    body = [[in_one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    return [markdown(f"| {' | '.join(row)} |") for row in (head, marks, *body)]


def append_step_summary(report: Mapping[str, Any]) -> bool:
    """Append the Markdown to the file that ``$GITHUB_STEP_SUMMARY`` names, where it does. Says whether it did."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return False
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(render_markdown(report) + "\n")
    except OSError:  # a summary is no reason to lose a finished run
        return False
    return True
