"""Rows of text on the details of a pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from compress.blockwise.details import MatrixDetails, ReconstructionDetails
from compress.formatting import fixed, format_bytes, percent, significant
from compress.passes.details import PassDetails


def block_rows(details: PassDetails) -> list[tuple[str, ...]]:
    """A row per block of a block-wise run: layers, their result, errors, reconstruction, seconds."""
    rows: list[tuple[str, ...]] = []
    for block in details.get("blocks", ()):
        layers, tuning = block.get("tensors", {}), block.get("tuning")
        if not layers and tuning is None:
            continue
        errors = {name: error for name, row in layers.items() if (error := row.get("error")) is not None}
        worst = max(errors, key=lambda name: errors[name], default=None)
        name = "" if worst is None else inside_block(worst, block["block"])
        rows.append(
            (
                str(block["block"]),
                str(len(layers)),
                _became(list(layers.values())),
                fixed(sum(errors.values()) / len(errors), 4) if errors else "",
                f"{name} {fixed(errors[worst], 4)}" if worst is not None else "",
                "" if tuning is None else _tuned(tuning),
                f"{block['seconds']:.1f}",
            )
        )
    return rows


def gap_rows(details: PassDetails) -> list[tuple[str, ...]]:
    """A row per block in front of removed ones: the matrix that takes over a part of them, and errors."""
    return [
        (
            str(block["block"]),
            inside_block(gap["matrix"], block["block"]),
            f"{fixed(gap['before'], 4)} ▶ {fixed(gap['after'], 4)}",
        )
        for block in details.get("blocks", ())
        if (gap := block.get("gap")) is not None
    ]


def inside_block(matrix: str, block: int) -> str:
    """Name of a matrix inside its block."""
    name = matrix.removesuffix(".weight")
    return name.partition(f".{block}.")[2] or name


def _became(layers: Sequence[MatrixDetails]) -> str:
    """Result of the layers: mean sparsity, units that they still read, formats, or ranks of factors; else nothing."""
    if not layers or layers[0].keys() == {"error"}:
        return ""
    if "kept" in layers[0]:
        return ", ".join(dict.fromkeys(f"{row['kept']} of {row['of']}" for row in layers))
    if formats := Counter(row["format"] for row in layers if "format" in row):
        return ", ".join(f"{count} {name}" if len(formats) > 1 else name for name, count in sorted(formats.items()))
    if ranks := sorted(row["rank"] for row in layers if "rank" in row):
        return f"rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[-1] > ranks[0] else "")
    return percent(sum(row["sparsity"] for row in layers) / len(layers))


def format_rows(details: PassDetails) -> list[tuple[str, ...]]:
    """A row per format that a budget chose: number of matrices, and the divergence expected from rounding them."""
    chosen: dict[str, list[float]] = {}
    for row in details.get("formats", ()):
        chosen.setdefault(row["format"], []).append(row["divergence"])
    return [(name, str(len(losses)), fixed(sum(losses), 4)) for name, losses in sorted(chosen.items(), reverse=True)]


def shape_rows(details: PassDetails) -> list[tuple[str, ...]]:
    """A row per shape tried for a target: removed blocks, heads, neurons, parameters, size, speed, divergence."""
    return [
        (
            ", ".join(map(str, row["layers"])) or "–",
            str(row["heads"]),
            str(row["mlp"]),
            f"{row['parameters']:,}",
            format_bytes(row["bytes"]),
            significant(row["prefill"]) if "prefill" in row else "–",
            fixed(row["divergence"], 4),
            "chosen" if row["chosen"] else "",
        )
        for row in details.get("shapes", ())
    ]


def window_rows(details: PassDetails) -> list[tuple[str, ...]]:
    """A row per block, or KV head: its number, its window, the loss expected of a window there, its share of the sum."""
    return [
        (
            f"{row['block']} head {row['head']}" if "head" in row else str(row["block"]),
            "full" if row["window"] is None else f"{row['window']:,}",
            fixed(row["loss"], 4) if "loss" in row else "–",
            percent(row["share"]) if "share" in row else "–",
        )
        for row in details.get("windows", ())
    ]


def sharing_rows(details: PassDetails) -> list[tuple[str, ...]]:
    """A row per arrangement of shared blocks that was tried, with its divergence; empty without a choice."""
    if (sharing := details.get("sharing")) is None:
        return []
    tried = sharing.get("tried", [])
    return [
        (
            row["arrangement"],
            " · ".join(" ".join(map(str, group)) for group in row["groups"]),
            fixed(row["divergence"], 4),
            "chosen" if row["arrangement"] == sharing["arrangement"] else "",
        )
        for row in tried
        if len(tried) > 1
    ]


def sharing_error(details: PassDetails) -> float | None:
    """Mean relative output error of the shared matrices; None for other passes."""
    sharing = details.get("sharing")
    rows = [] if sharing is None else sharing.get("tensors", [])
    errors = [row["error"] for row in rows if row.get("error") is not None]
    return sum(errors) / len(errors) if errors else None


def _tuned(tuning: ReconstructionDetails) -> str:
    text = f"{fixed(tuning['before'], 4)} ▶ {fixed(tuning['after'], 4)}"
    return text if tuning["kept"] else f"{text}, put back"
