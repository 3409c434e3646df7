"""Passes and run folders as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.cli.tables.layout import make_console, print_line, print_table
from compress.formatting import format_bytes


def print_passes(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print name and summary of every pass."""
    console = make_console()
    print_table(
        console,
        None,
        [("pass", "whole"), "what it does", "needs"],
        [(r["name"], r["summary"], ", ".join(r["needs"])) for r in rows],
    )
    print_line(console, "`compress passes NAME` shows every setting", "dim")


def print_pass(data: Mapping[str, Any]) -> None:
    """Print one pass: what it does, a sample, every setting."""
    from compress.settings import as_written

    console = make_console()
    print_line(console, data["name"], "bold")
    print_line(console, f"{data['summary']} {data['details']}".strip())
    needs = ", ".join(f"data.{n}" for n in data["needs"]) or "no data"
    print_line(console, f"mode: {data['mode']}, reads {needs}", "dim")
    if data["source"]:
        print_line(console, f"source: {data['source']}", "dim")
    if data["sample"]:
        print_line(console, "\nsample", "bold")
        for line in data["sample"].splitlines():
            print_line(console, f"  {line}", whole=True)
    print_line(console, "\nsettings", "bold")
    for setting in data["settings"]:
        usual = "none" if setting["default"] is None else as_written(setting["default"])
        default = "required" if setting["required"] else f"default {usual}"
        print_line(console, f"  {setting['name']}: {setting['type']}; {default}")
        print_line(console, f"      {setting['description']}", "dim")


def print_runs(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print run folders with status, stages and bytes."""
    console = make_console()
    if not runs:
        print_line(console, "no run folders here")
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
    print_table(
        console, None, ["run", "status", ("stages", "right"), ("bytes", "right"), ("`clean` frees", "right")], rows
    )
