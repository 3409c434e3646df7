"""What the commands show on stdout. rich lays tables out; it is imported when something is shown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from compress.escape import printable
from compress.settings import format_bytes

_STYLES = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "yellow",
    "passed": "green",
    "failed": "bold red",
    "no gates": "dim",
}


#: A column's name, or its name and how it is laid out: ``right`` for numbers, ``whole`` never broken.
Column: TypeAlias = str | tuple[str, str]


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False, emoji=False)


def _table(console: Any, title: str | None, columns: Sequence[Column], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for column in columns:
        name, kind = column if isinstance(column, tuple) else (column, "left")
        if kind == "right":
            table.add_column(name, justify="right", no_wrap=True)
        elif kind == "whole":
            table.add_column(name, no_wrap=True)
        else:
            table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(printable(str(cell))) for cell in row))
    console.print(table)


def _line(console: Any, text: str, style: str = "", *, whole: bool = False) -> None:
    """Print a line; ``whole`` ones are left to the terminal to break, so that paths can be copied."""
    console.print(printable(text), style=style, markup=False, soft_wrap=whole)


def print_report(report: Mapping[str, Any]) -> None:
    """Before ▶ after, the waterfall, the gates, and where things are."""
    from compress.report import figures
    from compress.report.experts import cold_experts

    console = _console()
    _line(console, f"{report['original']['checkpoint']} ▶ {report['output']}", "bold", whole=True)
    _table(
        console,
        None,
        [("", "whole"), ("before", "right"), ("after", "right"), "change"],
        [(r.name, r.before, r.after, r.change) for r in figures.before_after(report)],
    )
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
                *shown.values(step),
            )
        )
    head: list[Column] = ["pass", "settings", ("size", "right"), ("saved", "right"), ("left", "whole")]
    measured = any(row[5] for row in rows)
    if measured:
        head += [(shown.name, "right"), ("cost", "right")]
    if console.width < 100:  # settings need a line of their own to be readable
        rows = [(f"{r[0]}\n  {r[1]}" if r[1] else r[0], *r[2:]) for r in rows]
        head.remove("settings")
    _table(console, None, head, [row if measured else row[:-2] for row in rows])
    if report["gates"]:
        print_gates(report["gates"], report["status"], console)
    if (note := figures.quality_note(report)) is not None:
        _line(console, f"measured on {note}", "dim")
    for note in filter(None, [figures.speed_note(report), *cold_experts(report), *report["notes"]]):
        _line(console, note, "yellow" if " did not help: " in note else "dim", whole=True)
    _line(console, f"report: {report['run_folder']}/report.md (and .json)", "dim", whole=True)
    if report["published"]:
        _line(console, f"output: {report['output']}", whole=True)


def print_gates(gates: Sequence[Mapping[str, Any]], status: str, console: Any = None) -> None:
    """One line per gate, then the verdict."""
    from rich.text import Text

    console = console or _console()
    rows = [
        (Text(g["verdict"].upper() if g["verdict"] != "pass" else "pass", _STYLES[g["verdict"]]), g["gate"], g["text"])
        for g in gates
    ]
    if rows:
        _table(console, None, [("gate", "whole"), ("", "whole"), ""], rows)
    said = f"gates: {status}" if rows else f"no gates, and a training that did not help: {status}"
    _line(console, said, _STYLES.get(status, ""))


def print_plan(plan: Mapping[str, Any]) -> None:
    """Per pass: tensors, parameters, bytes in both stores, bits per weight, memory."""
    from compress.report.figures import changed_settings

    console = _console()
    other = "compact" if plan["store"] == "stock" else "stock"
    original = plan["original"]
    rows: list[Sequence[Any]] = [
        (
            "",
            "original",
            "",
            original["tensors"],
            f"{original['parameters']:,}",
            format_bytes(original["bytes"]),
            "",
            f"{original['bits_per_weight']:.2f}",
            "",
        )
    ]
    exact = True
    for stage in plan["stages"]:
        for row in stage["passes"]:
            size = row["planned"]
            exact &= row["exact"]
            about = "" if row["exact"] else "≈ "
            rows.append(
                (
                    stage["index"],
                    row["name"],
                    changed_settings(row["name"], row["settings"]),
                    size["tensors"],
                    f"{size['parameters']:,}",
                    about + format_bytes(size["bytes"]),
                    about + format_bytes(row["bytes_by_store"][other]) if other in row["bytes_by_store"] else "–",
                    f"{size['bits_per_weight']:.2f}",
                    format_bytes(row["peak_memory"]),
                )
            )
    head: list[Column] = [("", "right"), ("pass", "whole"), "settings", ("tensors", "right")]
    head += [("parameters", "right"), (plan["store"], "right"), (f"as {other}", "right"), ("bits", "right")]
    head.append(("memory", "right"))
    if console.width < 110:
        rows = [(r[0], f"{r[1]}\n  {r[2]}" if r[2] else r[1], *r[4:]) for r in rows]
        head = [h for h in head if h not in ("settings", ("tensors", "right"))]
        head[1] = "pass"
    _table(console, None, head, rows)
    for note in plan["notes"]:
        _line(console, note)
    last = plan["stages"][-1]["passes"][-1]["planned"]["bytes"]
    ratio = last / original["bytes"] if original["bytes"] else 0.0
    _line(console, f"output {format_bytes(last)}, × {ratio:.3f} of the original, store: {plan['store']}")
    for row in (row for stage in plan["stages"] for row in stage["passes"]):
        for note in row["notes"]:
            _line(console, f"{row['name']}: {note}")
    _line(console, f"peak memory about {format_bytes(plan['peak_memory'])}")
    free = plan["disk_free"]
    short = "" if plan["disk"] <= free else ": NOT ENOUGH"
    _line(console, f"disk {format_bytes(plan['disk'])} for the stages, {format_bytes(free)} free{short}")
    if not exact:
        _line(console, "≈ depends on the weights' values; the rest is exact", "dim")


def print_inspection(data: Mapping[str, Any], *, tensors: bool) -> None:
    """Totals, modules, and on demand every tensor."""
    console = _console()
    size = data["size"]
    kind = (
        f"{data['model_type']}"
        + (f", {data['class']}" if data["class"] else "")
        + (", compact" if data["compact"] else "")
    )
    _line(console, f"{data['checkpoint']}: {kind}", "bold")
    kept = f" ({size['kept_parameters']:,} kept)" if size["kept_parameters"] != size["parameters"] else ""
    _line(console, f"{format_bytes(size['bytes'])}, {size['tensors']} tensors, {size['parameters']:,} parameters{kept}")
    kv = (
        f", {size['kv_bytes_per_token']:,} bytes of KV cache per token"
        if size["kv_bytes_per_token"] is not None
        else ""
    )
    _line(console, f"{size['bits_per_weight']:.2f} bits per weight{kv}, dtypes {', '.join(data['dtypes'])}")
    for note in data["notes"]:
        _line(console, note)
    if data["edits"]:
        words = {
            "shared": "blocks share tensors of others", "residual": "residuals", "factors": "matrices as factors",
            "sized": "matrices of a width of their own", "projected": "tables with a projection",
        }  # fmt: skip
        _line(console, ", ".join(f"{count} {words[kind]}" for kind, count in data["edits"].items()))
    if not tensors:
        rows = [
            (
                m["module"],
                f"{m['parameters']:,}",
                format_bytes(m["bytes"]),
                ", ".join(m["dtypes"]),
                _storage(m["storage"]),
                f"tied to {m['tied_to']}" if m["tied_to"] else _percent(m["sparsity"]),
            )
            for m in data["modules"]
        ]
        _table(
            console, None, ["module", ("parameters", "right"), ("bytes", "right"), "dtype", "storage", "sparsity"], rows
        )
        return
    zeros = any("zeros" in t for t in data["tensors"])
    rows = [
        (
            t["name"],
            " × ".join(map(str, t["shape"])),
            t["dtype"],
            t["storage"] if t["storage"] != "dense" else "",
            format_bytes(t["bytes"]),
            f"tied to {t['tied_to']}" if t["tied_to"] else _percent(t["sparsity"]),
            *([_percent(t.get("zeros"))] if zeros else []),
        )
        for t in data["tensors"]
    ]
    head: list[Column] = ["tensor", "shape", "dtype", "storage", ("bytes", "right"), "sparsity"]
    head += [("zeros", "right")] if zeros else []
    _table(console, None, head, rows)


def _storage(chains: Sequence[str]) -> str:
    return ", ".join(c for c in chains if c != "dense")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def print_diff(data: Mapping[str, Any]) -> None:
    """Config keys and tensors that differ; equal ones are counted."""
    console = _console()
    a, b = data["size"]
    _line(console, f"{data['a']} ▶ {data['b']}", "bold", whole=True)
    if data["same"]:
        _line(console, "no difference")
        return
    _line(
        console,
        f"{format_bytes(a['bytes'])} ▶ {format_bytes(b['bytes'])}, {a['parameters']:,} ▶ {b['parameters']:,} parameters",
    )
    if data["config"]:
        rows = [(key, _value(x), _value(y)) for key, (x, y) in data["config"].items()]
        _table(console, "config", ["key", "before", "after"], rows)
    changed = [_diff_row(t) for t in data["tensors"] if t["change"] != "same"]
    if changed:
        _table(
            console,
            "tensors",
            ["tensor", "change", ("bytes", "right"), ("max |Δ|", "right"), ("rel Δ", "right")],
            changed,
        )
    same = sum(t["change"] == "same" for t in data["tensors"])
    _line(console, f"{same} of {len(data['tensors'])} tensors are equal", "dim")


def _value(value: Any) -> str:
    if value is None:
        return "–"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:199] + "…"


def _diff_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["change"] in ("removed", "added"):
        sign = "−" if row["change"] == "removed" else "+"
        return row["name"], row["change"], f"{sign}{format_bytes(row['bytes'])}", "", ""
    changes = []
    for key in ("shape", "dtype"):
        before, after = row[key]
        if before != after:
            changes.append(f"{before} ▶ {after}")
    before, after = row["sparsity"]
    if before != after:
        changes.append(f"sparsity {_percent(before) or '–'} ▶ {_percent(after) or '–'}")
    size = " ▶ ".join(dict.fromkeys(format_bytes(x) for x in row["bytes"]))
    largest, relative = row.get("max_difference"), row.get("relative_difference")
    return (
        row["name"],
        ", ".join(changes) or "values",
        size,
        "" if largest is None else f"{largest:.3g}",
        "" if relative is None else f"{relative:.2%}",
    )


def print_passes(rows: Sequence[Mapping[str, Any]]) -> None:
    """Name and summary of every pass."""
    console = _console()
    _table(
        console,
        None,
        [("pass", "whole"), "what it does", "needs"],
        [(r["name"], r["summary"], ", ".join(r["needs"])) for r in rows],
    )
    _line(console, "`compress passes NAME` shows every setting", "dim")


def print_pass(data: Mapping[str, Any]) -> None:
    """One pass with every setting."""
    console = _console()
    _line(console, data["name"], "bold")
    _line(console, f"{data['summary']} {data['details']}".strip())
    for line in data["sample"].splitlines():
        _line(console, f"    {line}", whole=True)
    needs = ", ".join(f"data.{n}" for n in data["needs"]) or "no data"
    _line(
        console,
        f"mode: {data['mode']}, reads {needs}, preserves {', '.join(data['preserves']) or 'nothing'}",
        "dim",
    )
    if data["source"]:
        _line(console, f"source: {data['source']}", "dim")
    rows = []
    for s in data["settings"]:
        default = "required" if s["required"] else json.dumps(s["default"])
        rows.append((s["name"], s["type"], default, s["description"]))
    _table(console, None, [("setting", "whole"), "type", "default", "what it does"], rows)


def print_runs(runs: Sequence[Mapping[str, Any]]) -> None:
    """Run folders with their stages."""
    console = _console()
    if not runs:
        _line(console, "no run folders here")
        return
    rows = []
    for run in runs:
        unused = sum(s["bytes"] for s in run["stages"] if not s["used"]) + sum(u["bytes"] for u in run["leftovers"])
        stages = f"{len(run['stages'])} ({sum(s['used'] for s in run['stages'])} used)"
        rows.append(
            (
                run["run"],
                run["status"] or ("unfinished" if run["run"].endswith(".run") else "left over"),
                stages,
                format_bytes(run["bytes"]),
                format_bytes(unused),
            )
        )
    _table(console, None, ["run", "status", ("stages", "right"), ("bytes", "right"), ("`clean` frees", "right")], rows)


def print_assessment(document: Mapping[str, Any]) -> None:
    """What ``eval`` measured, beside the baseline where there is one."""
    from compress.report import figures

    console = _console()
    baseline = document.get("baseline")
    if baseline is not None:
        _line(console, f"{baseline['checkpoint']} ▶ {document['checkpoint']}", "bold")
        rows = figures.before_after({"original": baseline, "result": document})
        _table(
            console,
            None,
            [("", "whole"), ("baseline", "right"), ("this", "right"), "change"],
            [(r.name, r.before, r.after, r.change) for r in rows],
        )
        _print_paired(console, document.get("paired"))
    else:
        _line(console, document["checkpoint"], "bold")
        rows = figures.before_after({"original": document, "result": document})
        _table(console, None, [("", "whole"), ("", "right")], [(r.name, r.after) for r in rows])
    settings, evaluation = document["settings"], document["evaluation"]
    if evaluation is not None:
        files = settings["files"] or [settings["images"]]
        note = figures.quality_note({"result": document, "data": {"evaluation": {"files": files}}})
        _line(console, f"measured on {note}", "dim")
    if (note := figures.speed_note({"result": document})) is not None:
        _line(console, note, "dim")


def _print_paired(console: Any, paired: Mapping[str, Any] | None) -> None:
    if not paired:
        return
    for name, shown in (("accuracy", "accuracy"), ("f1", "macro F1"), ("spearman", "Spearman")):
        if name in paired:
            p = paired[name]
            text = f"{shown} drops by {p['drop']:.2f} points (between {p['lower']:.2f} and {p['upper']:.2f}, each at "
            _line(console, f"{text}{paired['confidence']:.4g} confidence, {paired['units']} {paired['unit']}s)")
    for name, shown in (("bits_per_byte", "bits per byte"), ("perplexity", "perplexity")):
        if name in paired:
            p = paired[name]
            text = f"{shown} {p['increase']:+.2%} (between {p['lower']:+.2%} and {p['upper']:+.2%}, each at "
            _line(console, f"{text}{paired['confidence']:.4g} confidence, {paired['units']} {paired['unit']}s)")
