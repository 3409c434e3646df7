"""The knapsack, against every choice."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("seed", range(5))
def test_choose_matches_exhaustive_search(seed):
    from itertools import product

    from compress.solvers.knapsack import choose

    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(1, 40, (5, 3), generator=generator).tolist()
    losses = torch.rand(5, 3, generator=generator).tolist()
    for budget in (sum(map(min, costs)) - 1, sum(map(min, costs)), 60, 90, 300):
        every = [
            (sum(losses[i][c] for i, c in enumerate(choice)), choice)
            for choice in product(range(3), repeat=5)
            if sum(costs[i][c] for i, c in enumerate(choice)) <= budget
        ]
        chosen = choose(costs, losses, budget)
        assert (chosen is None) == (not every)
        if every:
            assert sum(costs[i][c] for i, c in enumerate(chosen)) <= budget
            assert sum(losses[i][c] for i, c in enumerate(chosen)) == pytest.approx(min(every)[0])
