"""One choice for each item, of least total loss within a budget: the multiple-choice knapsack, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence

#: Steps that the budget is divided into; costs are rounded up to whole ones, so a budget is never exceeded.
_STEPS = 1 << 13


def choose(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """Number of the choice of each item; None if even the cheapest ones exceed the budget.

    Args:
        costs, losses: of each choice of each item. budget: most that the chosen costs may sum to.

    Exact for costs in whole steps of 1/8192 of what the budget leaves above the cheapest choices.
    """
    import numpy as np

    least = [min(row) for row in costs]
    spare = budget - sum(least)
    if spare < 0:
        return None
    step = max(1, -(-spare // _STEPS))
    width = spare // step + 1
    best = np.zeros(width)
    picked = []
    for row, loss, low in zip(costs, losses, least, strict=True):
        options = np.full((len(row), width), np.inf)
        for number, (cost, value) in enumerate(zip(row, loss, strict=True)):
            steps = -(-(cost - low) // step)
            if steps < width:
                options[number, steps:] = best[: width - steps] + value
        picked.append(options.argmin(0))
        best = options.min(0)
    at, chosen = width - 1, []
    for row, low, numbers in zip(reversed(costs), reversed(least), reversed(picked), strict=True):
        number = int(numbers[at])
        chosen.append(number)
        at -= -(-(row[number] - low) // step)
    return chosen[::-1]
