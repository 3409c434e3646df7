"""Differences between two checkpoints, also where blocks were removed or added and the others renumbered."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.checkpoint.layout import natural
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Checkpoint
from compress.inspection.contents import sparsity, stored_bytes
from compress.inspection.matching import match_blocks
from compress.planning import size_on_disk


def diff(
    a: str | Path,
    b: str | Path,
    *,
    values: bool = True,
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
) -> dict[str, Any]:
    """Differences from checkpoint ``a`` to ``b``, as JSON values, schema ``compress.diff/1``.

    Where a list of blocks has become shorter or longer, ``blocks`` says which were removed, added and renumbered, and tensors
    of the same block are compared: ``name`` is that in ``a``, and ``name_after`` that in ``b`` where it is another.

    A tensor that both hold in the same shape gets the largest absolute difference of its values, and the relative difference
    ‖b - a‖ / ‖a‖ (Frobenius norm, float64).

    Args:
        values: compare weights too; False compares only headers, and reads a few vectors to match blocks.
    """
    code = {"trust_remote_code": trust_remote_code, "ignore_auto_map": ignore_auto_map}
    first, second = (open_checkpoint(x, **code) for x in (a, b))
    matches, names = match_blocks(first, second, values=values)
    rows = _rows(first, second, names, values)
    before, after = first.spec.structure.config, second.spec.structure.config
    keys = sorted(before.keys() | after.keys())
    config = {key: [before.get(key), after.get(key)] for key in keys if before.get(key) != after.get(key)}
    return {
        "schema": "compress.diff/1",
        "a": str(a),
        "b": str(b),
        "size": [asdict(size_on_disk(first)), asdict(size_on_disk(second))],
        "config": config,
        "blocks": [match.to_dict() for match in matches],
        "tensors": rows,
        "same": all(row["change"] == "same" for row in rows) and not config and not matches,
    }


def _rows(first: Checkpoint, second: Checkpoint, names: dict[str, str], values: bool) -> list[dict[str, Any]]:
    """A row per tensor, in natural order. ``names``: name in the second ▶ in the first."""
    after = {name: other for other, name in names.items()}
    pairs: list[tuple[str | None, str | None]] = [
        (name if name in first.spec.tensors else None, after.get(name)) for name in first.spec.tensors.keys() | after
    ]
    pairs += [(None, name) for name in second.spec.tensors if name not in names]
    rows = [_difference(first, second, *pair, values) for pair in pairs]
    return sorted(rows, key=lambda row: natural(row["name"]))


def _difference(
    first: Checkpoint, second: Checkpoint, old: str | None, new: str | None, values: bool
) -> dict[str, Any]:
    """One tensor of `diff`: ``change`` is ``added``, ``removed``, ``changed`` or ``same``.

    Args:
        old, new: its names in the two; None where one lacks it.
    """
    before = None if old is None else first.spec.tensors[old]
    after = None if new is None else second.spec.tensors[new]
    if before is None or after is None:
        present, spec = (before, first.spec) if after is None else (after, second.spec)
        assert present is not None
        change = "removed" if after is None else "added"
        return {
            "name": present.name,
            "change": change,
            "shape": list(present.shape),
            "bytes": stored_bytes(spec, present),
        }
    row: dict[str, Any] = {
        "name": before.name,
        "change": "same",
        "shape": [list(before.shape), list(after.shape)],
        "dtype": [before.dtype, after.dtype],
        "sparsity": [sparsity(before), sparsity(after)],
        "bytes": [stored_bytes(first.spec, before), stored_bytes(second.spec, after)],
    }
    if after.name != before.name:
        row["name_after"] = after.name
    if any(getattr(before, key) != getattr(after, key) for key in ("shape", "dtype", "kept", "storage")):
        row["change"] = "changed"
    if values and before.shape == after.shape and not (before.alias_of and after.alias_of):
        x, y = first.tensor(before.name).data.double(), second.tensor(after.name).data.double()
        row["max_difference"] = float((y - x).abs().max()) if x.numel() else 0.0
        norm = float(x.norm())
        row["relative_difference"] = (
            float((y - x).norm()) / norm if norm else (0.0 if row["max_difference"] == 0 else float("inf"))
        )
        if row["max_difference"] != 0:  # also where it is NaN
            row["change"] = "changed"
    return row
