"""An export as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.cli.tables.layout import make_console, print_line, print_table
from compress.formatting import format_bytes


def print_export(checkpoint: str, output: Path, plan: Mapping[str, Any], *, written: bool) -> None:
    """Print where an export was, or would be, written, its size, and a row per type of tensor."""
    console = make_console()
    print_line(console, f"{checkpoint} ▶ {output}", "bold", whole=True)
    about = "" if plan["exact"] else "about "
    print_line(console, f"{about}{format_bytes(plan['bytes'])}{'' if written else '; nothing was written'}")
    rows = [
        (
            row["source"],
            row["type"],
            f"{row['tensors']:,}",
            format_bytes(row["bytes"]),
            "exact" if row["exact"] else "rounded",
        )
        for row in plan["tensors"]
    ]
    columns = [("from", "whole"), ("to", "whole"), ("tensors", "right"), ("bytes", "right"), ("values", "whole")]
    print_table(console, None, columns, rows)
    for note in plan["notes"]:
        print_line(console, note)
