"""Plans as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.cli.tables.layout import make_console, print_line, print_table
from compress.formatting import format_bytes, ratio_of
from compress.tabular import Column
from compress.work import minutes_text


def print_plan(plan: Mapping[str, Any]) -> None:
    """Print a row per pass (tensors, parameters, bytes in both stores, bits per weight, memory), then totals."""
    console = make_console()
    other = "compact" if plan["store"] == "stock" else "stock"
    original = plan["original"]
    passes = [row for stage in plan["stages"] for row in stage["passes"]]
    rows: list[Sequence[Any]] = [_original_row(original)]
    rows += [_pass_row(stage["index"], row, other) for stage in plan["stages"] for row in stage["passes"]]
    head: list[Column] = [("", "right"), ("pass", "whole"), "settings", ("tensors", "right")]
    head += [("parameters", "right"), (plan["store"], "right"), (f"as {other}", "right"), ("bits", "right")]
    head.append(("memory", "right"))
    if console.width < 110:
        rows = [(r[0], f"{r[1]}\n  {r[2]}" if r[2] else r[1], *r[4:]) for r in rows]
        head = [h for h in head if h not in ("settings", ("tensors", "right"))]
        head[1] = "pass"
    print_table(console, None, head, rows)
    for note in plan["notes"]:
        print_line(console, note)
    last = passes[-1]["planned"]["bytes"]
    change = f", {ratio_of(original['bytes'], last)} of the original" if original["bytes"] else ""
    print_line(console, f"output {format_bytes(last)}{change}, store: {plan['store']}")
    for row in plan.get("exports", ()):
        size = "" if row["bytes"] is None else f" {'' if row['exact'] else '≈ '}{format_bytes(row['bytes'])}"
        print_line(console, f"export{size}: {row['path']}")
    if plan["opens"]:
        print_line(console, plan["opens"])
    _print_cache(console, plan["cache"])
    for row in passes:
        for note in row["notes"]:
            print_line(console, f"{row['name']}: {note}")
    for hint in plan.get("hints", ()):
        print_line(console, f"hint: {hint}")
    print_line(console, f"peak memory about {format_bytes(plan['peak_memory'])}")
    _print_time(console, passes, plan["seconds"])
    free = plan["disk_free"]
    short = "" if plan["disk"] <= free else ": NOT ENOUGH"
    print_line(console, f"disk {format_bytes(plan['disk'])} for the stages, {format_bytes(free)} free{short}")
    if not all(row["exact"] for row in passes):
        print_line(console, "≈ depends on the values of the weights; the other numbers are exact", "dim")


def _print_time(console: Any, passes: Sequence[Mapping[str, Any]], others: Mapping[str, float | None]) -> None:
    """Print how long the run takes, and each part; nothing where no rates of this machine are known."""
    parts = [("start and data", others["preparation"]), *((row["name"], row["seconds"]) for row in passes)]
    parts.append(("evaluation", others["evaluation"]))
    known = [one for _, one in parts if one is not None]
    if not known:
        return
    each = ", ".join(f"{name} {minutes_text(one)}" for name, one in parts if one != 0)
    head = "about" if len(known) == len(parts) else "more than"
    print_line(console, f"time {head} {minutes_text(sum(known))} on this machine: {each}")


def _print_cache(console: Any, cache: Sequence[Mapping[str, int]]) -> None:
    """Print the planned bytes of the cache by length; nothing where they are not known."""
    if not cache:
        return
    rows = [
        (
            f"{row['length']:,}",
            format_bytes(row["original"]),
            format_bytes(row["result"]),
            ratio_of(row["original"], row["result"]),
        )
        for row in cache
    ]
    head: list[Column] = [("cache after tokens", "right"), ("original", "right"), ("result", "right"), ("", "right")]
    print_table(console, None, head, rows)


def _original_row(size: Mapping[str, Any]) -> Sequence[Any]:
    parameters, stored = f"{size['parameters']:,}", format_bytes(size["bytes"])
    return ("", "original", "", size["tensors"], parameters, stored, "", f"{size['bits_per_weight']:.2f}", "")


def _pass_row(stage: int, row: Mapping[str, Any], other: str) -> Sequence[Any]:
    from compress.report.figures import changed_settings

    size = row["planned"]
    about = "" if row["exact"] else "≈ "
    return (
        stage,
        row["name"],
        changed_settings(row["name"], row["settings"]),
        size["tensors"],
        f"{size['parameters']:,}",
        about + format_bytes(size["bytes"]),
        about + format_bytes(row["bytes_by_store"][other]) if other in row["bytes_by_store"] else "–",
        f"{size['bits_per_weight']:.2f}",
        format_bytes(row["peak_memory"]),
    )
