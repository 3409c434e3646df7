"""Allocate a number of weights to matrices: least total loss for an exact total, from losses measured at a few sparsities."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from compress.solvers.knapsack import choose

#: Step in which sparsities are chosen.
_STEP = 0.01


def allocate_sparsity(
    sizes: Sequence[int], most: Sequence[int], sparsities: Sequence[float], losses: Sequence[Sequence[float]], kept: int
) -> list[int]:
    """Return the number of weights that each matrix keeps; their sum is ``kept``, or all weights if those are fewer.

    The logarithm of the loss is interpolated linearly between measured sparsities. The knapsack finds the best sparsities in
    steps of 1 % within ``kept``. The remainder goes to the matrices that gain most per weight.

    Args:
        sizes: number of weights of each matrix.
        most: number of weights that each matrix may keep.
        sparsities: measured sparsities, ascending.
        losses: loss of each matrix at each of those sparsities.
        kept: number of weights to keep in all.

    Raises:
        ValueError: even the highest sparsity keeps more than ``kept``.
    """
    steps = round((sparsities[-1] - sparsities[0]) / _STEP)
    fine = [sparsities[0] + (sparsities[-1] - sparsities[0]) * i / max(steps, 1) for i in range(steps + 1)]
    costs = [[min(size - round(s * size), limit) for s in fine] for size, limit in zip(sizes, most, strict=True)]
    values = [[interpolate_loss(sparsities, row, s) for s in fine] for row in losses]
    chosen = choose(costs, values, kept)
    if chosen is None:
        raise ValueError("the highest sparsity keeps more than is asked")
    counts = [row[i] for row, i in zip(costs, chosen, strict=True)]
    left = kept - sum(counts)
    # reduction of the loss per weight at the next lower sparsity
    gains = [
        (row[i] - row[i - 1]) / max(cost[i - 1] - cost[i], 1) if i else 0.0
        for row, cost, i in zip(values, costs, chosen, strict=True)
    ]
    for number in sorted(range(len(sizes)), key=lambda n: -gains[n]):
        more = min(left, most[number] - counts[number])
        counts[number] += more
        left -= more
    return counts


def interpolate_loss(sparsities: Sequence[float], losses: Sequence[float], sparsity: float) -> float:
    """Return the loss at a sparsity within the measured ones, log-linear between neighbours; losses of 0 count as 1e-30."""
    after = min(max(bisect_left(sparsities, sparsity), 1), len(sparsities) - 1)
    share = (sparsity - sparsities[after - 1]) / (sparsities[after] - sparsities[after - 1])
    low, high = (math.log(max(losses[i], 1e-30)) for i in (after - 1, after))
    return math.exp(low + share * (high - low))
