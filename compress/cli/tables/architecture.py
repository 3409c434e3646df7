"""The architecture of a checkpoint, as it was written down or inferred, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.cli.tables.layout import make_console, print_line, print_table

_SOURCES = {
    "written": "its record is written by hand",
    "inferred": "inferred from its class",
    "shapes": "told by the names and shapes of its tensors alone",
}


def print_architecture(data: Mapping[str, Any]) -> None:
    """Print where the record comes from, then the lists of blocks, their matrices, and what lies outside."""
    console = make_console()
    kind = f"{data['model_type']}, {data['class']}" if data["class"] else data["model_type"]
    print_line(console, f"{data['checkpoint']}: {kind}: {_SOURCES[data['source']]}", "bold")
    for row in data["lists"]:
        name = {"main": "blocks", "stack": "further blocks", "tower": "tower, left as it is by default"}[row["kind"]]
        print_line(console, f"{row['path']}: {row['blocks']} {name}")
    rows = [
        (
            row["part"] if len(data["lists"]) == 1 else f"{row['list']}.*.{row['part']}",
            row["role"] if row["layer"] else f"{row['role']}, no layer",
            ", ".join(" × ".join(map(str, shape)) for shape in row["shapes"][:3]) + ("…" * (len(row["shapes"]) > 3)),
            str(row["blocks"]),
        )
        for row in data["parts"]
    ]
    if rows:
        print_table(console, None, ["matrix of a block", "role", "shape", ("blocks", "right")], rows)
    for name, values in (
        ("embeddings", data["embeddings"]),
        ("head", [data["head"]] if data["head"] else []),
        ("tied", [f"{name} to {source}" for name, source in data["ties"][:6]]),
        ("config", [f"{name}: {key}" for name, key in data["keys"].items()]),
        ("lists by block", data["per_layer"]),
    ):
        if values:
            print_line(console, f"{name}: {', '.join(values)}")
    for group in data["groups"]:
        print_line(console, group)
    if data["unknown"]:
        print_line(console, f"not known: {'; '.join(data['unknown'])}")
