"""The contents of a checkpoint and differences between two as tables of text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compress.formatting import format_bytes
from compress.inspection.folding import folded, ranges
from compress.tabular import Column, TextTable


def inspection_tables(data: Mapping[str, Any], *, every: bool = False) -> list[TextTable]:
    """Tensors with shape, dtype, storage, bytes and sparsity.

    Args:
        data: of `inspect`. every: a row per tensor; else equal tensors of blocks and experts are one row.
    """
    cells = {row["name"]: _tensor_cells(row) for row in data["tensors"]}
    head: list[Column] = [("tensor", "whole"), ("count", "right"), ("shape", "whole"), "dtype", "storage"]
    head += [("bytes", "right"), ("sparsity", "whole"), ("zeros", "right")]
    if every:
        return [TextTable("", head, [(name, "", *rest) for name, rest in cells.items()]).filled()]
    groups = folded((name, rest) for name, rest in cells.items() if name not in _ties(data))
    rows = [(name, f"{len(names)} ×" if len(names) > 1 else "", *cells[names[0]]) for name, names in groups]
    if any(row[1] for row in rows):
        head[5] = ("each", "right")
    if len(data["dtypes"]) == 1:  # it stands above the table
        head, rows = [*head[:3], *head[4:]], [(*row[:3], *row[4:]) for row in rows]
    return [TextTable("", head, rows).filled()]


def _ties(data: Mapping[str, Any]) -> dict[str, str]:
    return {row["name"]: row["tied_to"] for row in data["tensors"] if row["tied_to"]}


def tie_lines(data: Mapping[str, Any]) -> list[str]:
    """A line per tensor that is another one's alias; equal ones of blocks and experts are one line."""
    ties = _ties(data)
    return [f"{name}: tied to {ties[names[0]]}" for name, names in folded(ties.items())]


def _tensor_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        " × ".join(map(str, row["shape"])),
        row["dtype"],
        row["storage"] if row["storage"] != "dense" else "",
        format_bytes(row["bytes"]),
        f"tied to {row['tied_to']}" if row["tied_to"] else percent(row["sparsity"]),
        percent(row.get("zeros")),
    )


def percent(share: float | None) -> str:
    """A share as text; empty where there is none."""
    return "" if share is None else f"{share:.1%}"


def block_lines(data: Mapping[str, Any]) -> list[str]:
    """A line per list of blocks that has become shorter or longer: which were removed, added and renumbered."""
    lines = []
    for match in data["blocks"]:
        parts = [
            f"block{'s' if len(match[kind]) > 1 else ''} {ranges(match[kind])} {kind}"
            for kind in ("removed", "added")
            if match[kind]
        ]
        parts += [f"{ranges(old)} ▶ {ranges(new)}" for old, new in _shifts(match["renumbered"])]
        lines.append(f"{match['path']}: {'; '.join(parts)}")
    return lines


def _shifts(pairs: Iterable[Sequence[int]]) -> list[tuple[list[int], list[int]]]:
    """Renumbered blocks, together where they moved by the same number."""
    result: list[tuple[list[int], list[int]]] = []
    for old, new in pairs:
        if result and result[-1][0][-1] - result[-1][1][-1] == old - new:
            result[-1][0].append(old)
            result[-1][1].append(new)
        else:
            result.append(([old], [new]))
    return result


def difference_tables(data: Mapping[str, Any], *, every: bool = False) -> list[TextTable]:
    """Config keys and tensors that differ.

    Args:
        data: of `diff`. every: a row per tensor; else a removed or added block is one row, and so are tensors of blocks that
            changed alike, with the least and the largest difference.
    """
    tables = []
    if data["config"]:
        rows = [(key, _value(x), _value(y)) for key, (x, y) in data["config"].items()]
        tables.append(TextTable("config", [("key", "whole"), "before", "after"], rows))
    head: list[Column] = [("tensor", "whole"), ("count", "right"), ("change", "whole"), ("bytes", "right")]
    head += [("max |Δ|", "right"), ("rel Δ", "right")]
    changed = [row for row in data["tensors"] if row["change"] != "same"]
    if changed:
        tables.append(TextTable("tensors", head, _changed_rows(data, changed, every)).filled())
    return tables


def _changed_rows(data: Mapping[str, Any], changed: Sequence[Mapping[str, Any]], every: bool) -> list[tuple[str, ...]]:
    if every:
        return [(row["name"], "", *_changed_cells([row])) for row in changed]
    rows = {(row["change"] == "added", row["name"]): row for row in changed}
    result: list[tuple[str, ...]] = []
    for match in data["blocks"]:
        for kind in ("removed", "added"):
            for number in match[kind]:
                start = f"{match['path']}.{number}."
                keys = [key for key, row in rows.items() if row["change"] == kind and key[1].startswith(start)]
                gone = [rows.pop(key) for key in keys]
                result.append(
                    (f"{start}*", f"{len(gone)} ×", kind, _signed(kind, sum(r["bytes"] for r in gone)), "", "")
                )
    for added in (False, True):
        left = {name: row for (is_added, name), row in rows.items() if is_added == added}
        for name, names in folded((name, _change(row)) for name, row in left.items()):
            cells = _changed_cells([left[each] for each in names])
            result.append((name, f"{len(names)} ×" if len(names) > 1 else "", *cells))
    return result


def _change(row: Mapping[str, Any]) -> str:
    """The change besides values."""
    if row["change"] in ("removed", "added"):
        return str(row["change"])
    changes = []
    for key in ("shape", "dtype"):
        before, after = row[key]
        if before != after:
            changes.append(f"{_shape(before)} ▶ {_shape(after)}")
    before, after = row["sparsity"]
    if before != after:
        changes.append(f"sparsity {percent(before) or '–'} ▶ {percent(after) or '–'}")
    return ", ".join(changes) or "values"


def _shape(value: Any) -> str:
    return " × ".join(map(str, value)) if isinstance(value, list) else str(value)


def _changed_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Change, bytes of all, and the span of the differences of tensors that changed alike."""
    kind = _change(rows[0])
    if kind in ("removed", "added"):
        return kind, _signed(kind, sum(row["bytes"] for row in rows)), "", ""
    sums = (sum(row["bytes"][side] for row in rows) for side in (0, 1))
    size = " ▶ ".join(dict.fromkeys(map(format_bytes, sums)))
    return kind, size, _span(rows, "max_difference", ".3g"), _span(rows, "relative_difference", ".1%")


def _signed(kind: str, size: int) -> str:
    return f"{'-' if kind == 'removed' else '+'}{format_bytes(size)}"


def _span(rows: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return ""
    return " to ".join(dict.fromkeys(f"{value:{form}}" for value in (min(values), max(values))))


def _value(value: Any) -> str:
    if value is None:
        return "–"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:199] + "…"
