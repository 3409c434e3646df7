"""Checkpoints, and differences between two, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.checkpoint.edits import EDIT_KINDS
from compress.cli.tables.layout import make_console, print_laid_out, print_line
from compress.formatting import format_bytes
from compress.inspection.rows import block_lines, difference_tables, inspection_tables, tie_lines


def print_inspection(data: Mapping[str, Any], *, tensors: bool) -> None:
    """Print totals, then a row per tensor; without ``tensors``, equal ones of blocks and experts are one row."""
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
    for table in inspection_tables(data, every=tensors):
        print_laid_out(console, table)
    for line in [] if tensors else tie_lines(data):
        print_line(console, line)


def print_diff(data: Mapping[str, Any], *, tensors: bool) -> None:
    """Print config keys, blocks and tensors that differ, a row per tensor with ``tensors``, and the number of equal tensors."""
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
    for line in block_lines(data):
        print_line(console, line)
    for table in difference_tables(data, every=tensors):
        print_laid_out(console, table)
    same = sum(t["change"] == "same" for t in data["tensors"])
    print_line(console, f"{same} of {len(data['tensors'])} tensors are equal", "dim")
