"""Checkpoints, and differences between two, as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from compress.checkpoint.edits import EDIT_KINDS
from compress.cli.tables.layout import Column, make_console, print_line, print_table
from compress.settings import format_bytes


def print_inspection(data: Mapping[str, Any], *, tensors: bool) -> None:
    """Print totals, then a row per module, or per tensor with ``tensors``."""
    console = make_console()
    size = data["size"]
    kind = (
        f"{data['model_type']}"
        + (f", {data['class']}" if data["class"] else "")
        + (", compact" if data["compact"] else "")
    )
    print_line(console, f"{data['checkpoint']}: {kind}", "bold")
    kept = f" ({size['kept_parameters']:,} kept)" if size["kept_parameters"] != size["parameters"] else ""
    print_line(
        console, f"{format_bytes(size['bytes'])}, {size['tensors']} tensors, {size['parameters']:,} parameters{kept}"
    )
    kv = (
        f", {size['kv_bytes_per_token']:,} bytes of KV cache per token"
        if size["kv_bytes_per_token"] is not None
        else ""
    )
    print_line(console, f"{size['bits_per_weight']:.2f} bits per weight{kv}, dtypes {', '.join(data['dtypes'])}")
    if data["cache"]:
        shown = ", ".join(f"{format_bytes(row['bytes'])} after {row['length']:,}" for row in data["cache"])
        print_line(console, f"cache by tokens: {shown}")
    for note in data["notes"]:
        print_line(console, note)
    if data["edits"]:
        print_line(console, ", ".join(f"{count} {EDIT_KINDS[kind].label}" for kind, count in data["edits"].items()))
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
        print_table(
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
    print_table(console, None, head, rows)


def _storage(chains: Sequence[str]) -> str:
    return ", ".join(c for c in chains if c != "dense")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def print_diff(data: Mapping[str, Any]) -> None:
    """Print the config keys and tensors that differ, and the number of equal tensors."""
    console = make_console()
    a, b = data["size"]
    print_line(console, f"{data['a']} ▶ {data['b']}", "bold", whole=True)
    if data["same"]:
        print_line(console, "no difference")
        return
    print_line(
        console,
        f"{format_bytes(a['bytes'])} ▶ {format_bytes(b['bytes'])}, {a['parameters']:,} ▶ {b['parameters']:,} parameters",
    )
    if data["config"]:
        rows = [(key, _value(x), _value(y)) for key, (x, y) in data["config"].items()]
        print_table(console, "config", ["key", "before", "after"], rows)
    changed = [_diff_row(t) for t in data["tensors"] if t["change"] != "same"]
    if changed:
        print_table(
            console,
            "tensors",
            ["tensor", "change", ("bytes", "right"), ("max |Δ|", "right"), ("rel Δ", "right")],
            changed,
        )
    same = sum(t["change"] == "same" for t in data["tensors"])
    print_line(console, f"{same} of {len(data['tensors'])} tensors are equal", "dim")


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
