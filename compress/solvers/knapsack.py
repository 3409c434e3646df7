"""The multiple-choice knapsack by dynamic programming: one option per item, least total loss within a budget."""

from __future__ import annotations

from collections.abc import Sequence

#: Most steps that the spare budget is divided into.
_STEPS = 1 << 13


def choose(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """Return the index of the chosen option of each item; None if even the cheapest options exceed the budget.

    The spare budget, above the cheapest options, is divided into at most 8192 steps. An option's cost above the cheapest is
    rounded up to whole steps, so the budget is never exceeded. The result is exact if all these costs are whole steps.
    Otherwise it is at least as good as any choice that leaves one step per item unused.

    Args:
        costs, losses: cost and loss of each option of each item.
        budget: bound on the sum of the chosen costs.
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
