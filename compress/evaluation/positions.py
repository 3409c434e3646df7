"""Loss by position: sums over the tokens that a model predicts at positions 0-15, 16-31, 32-63 and so on. Imports no torch.

The position of a prediction is the index, in the window that the model reads, of the last token that it has seen. A loss that
rises with the position shows a model that has lost what is far away, which the mean over a window hides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from compress.errors import ReportError
from compress.evaluation.metrics import of_kind, table
from compress.evaluation.metrics.base import Metric, Resampling, Scored, same_tokens
from compress.evaluation.metrics.ratio import RatioMetric

#: Positions of the first bin. Each later bin begins at the next power of two.
FIRST_BIN = 16
#: Sums that a row holds for every bin.
SUMS = ("tokens", "bytes", "nll", "kl", "agree")


def first_position(number: int) -> int:
    """First position of a bin: 0, 16, 32, 64, …."""
    return FIRST_BIN << (number - 1) if number else 0


def bin_of(position: int) -> int:
    """Number of the bin of a position."""
    return (position // FIRST_BIN).bit_length()


def spans(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The bins of positions from ``start`` to before ``stop``: number, first position and position after the last."""
    while start < stop:
        number = bin_of(start)
        end = min(stop, first_position(number + 1))
        yield number, start, end
        start = end


def is_edge(position: int) -> bool:
    """Whether a bin begins at a position above 0."""
    return position >= FIRST_BIN and position & (position - 1) == 0


def of_tokens() -> list[Metric]:
    """The metrics of causal language models that are functions of sums over tokens, so each position has its own."""
    return [metric for metric in of_kind("evaluation") if isinstance(metric, RatioMetric)]


def by_position(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics of each bin over all rows, the first position of each as ``from`` and its last as ``to``."""
    if any(row.get("positions") is None for row in rows):
        return []
    bins = []
    for number in range(max(len(row["positions"]["tokens"]) for row in rows)):
        part = _rows(rows, number, number + 1)
        if not part:
            continue
        nats = math.fsum(row["nll"] for row in part)
        first, last = first_position(number), first_position(number + 1) - 1
        counts = {key: sum(row[key] for row in part) for key in ("tokens", "bytes")}
        entry: dict[str, Any] = {"from": first, "to": last, **counts, "nats_per_token": nats / counts["tokens"]}
        entry |= {metric.name: metric.value({"unit": "document", "documents": part}) for metric in of_tokens()}
        bins.append(entry)
    return bins


def _rows(rows: Sequence[dict[str, Any]], start: int, stop: int | None = None) -> list[dict[str, Any]]:
    """The rows' sums over bins from ``start`` to before ``stop``. Rows without text there are left out."""
    parts = []
    for row in rows:
        sums: dict[str, Any] = {"id": row["id"]}
        for key in SUMS:
            values = row["positions"][key]
            sums[key] = None if values is None else sum(values[start:stop])
        if sums["bytes"]:
            parts.append(sums)
    return parts


def beyond(evaluation: Scored, first: int) -> dict[str, Any]:
    """The evaluation as if only the tokens at positions from ``first`` on had been scored.

    Args:
        first: where a bin begins.

    Raises:
        ReportError: the evaluation has no sums by position, or no token there.
    """
    rows = evaluation["documents"]
    if any(row.get("positions") is None for row in rows):
        raise ReportError("the evaluation has no sums by position", fix="evaluate causal language models anew")
    if not (parts := _rows(rows, bin_of(first))):
        raise ReportError(f"no token was scored at position {first} or later", fix="give longer documents")
    return {**evaluation, "documents": parts}


def paired(before: Scored | None, after: Scored | None, resampling: Resampling) -> list[dict[str, Any]] | None:
    """Loss of two evaluations by position, with intervals of the relative increase of bits per byte.

    Returns:
        A row for each bin: ``from``, ``to``, ``tokens``, ``bits_per_byte`` and ``nats_per_token`` as ``[before, after]``,
        ``kl``, ``increase``, ``lower``, ``upper``. None where one is missing, has no sums by position, or other tokens.
    """
    if (
        not before
        or not after
        or not before.get("positions")
        or not after.get("positions")
        or not same_tokens(before, after)
    ):
        return None
    metric, bins = table()["bits_per_byte"], []
    for x, y in zip(before["positions"], after["positions"], strict=True):
        number = bin_of(x["from"])
        first, last = ({**each, "documents": _rows(each["documents"], number, number + 1)} for each in (before, after))
        interval = metric.increase(first, last, resampling, relative=True)
        row = {key: x[key] for key in ("from", "to", "tokens")}
        row |= {key: [x[key], y[key]] for key in ("bits_per_byte", "nats_per_token")}
        bounds = {"increase": interval.value, "lower": interval.lower, "upper": interval.upper}
        bins.append({**row, "kl": y["kl"], **bounds})
    return bins
