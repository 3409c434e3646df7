"""Sharing out a sparsity: exact in total, and no worse than any other choice in steps of 1 %."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.solvers.sparsity_allocation import allocate_sparsity, interpolate_loss

SPARSITIES = [0.5, 0.52, 0.54]


def slow_interpolated(sparsity, losses):
    """Walks along the measured points."""
    for i in range(len(SPARSITIES) - 1):
        low, high = SPARSITIES[i : i + 2]
        if low <= sparsity <= high:
            along = (sparsity - low) / (high - low)
            return losses[i] ** (1 - along) * losses[i + 1] ** along
    raise AssertionError


@given(st.data())
def test_allocate_sparsity_matches_exhaustive_search(data):
    count = data.draw(st.integers(1, 3))
    sizes = [data.draw(st.integers(50, 400)) for _ in range(count)]
    most = [data.draw(st.integers(size // 4, size)) for size in sizes]
    steps = st.floats(0.01, 1)
    losses = [list(itertools.accumulate(data.draw(st.tuples(steps, steps, steps)))) for _ in range(count)]
    kept = data.draw(st.integers(int(0.4 * sum(sizes)), int(0.5 * sum(sizes))))
    fine = [0.5 + 0.01 * i for i in range(5)]
    costs = [[min(n - round(s * n), m) for s in fine] for n, m in zip(sizes, most, strict=True)]
    every = [c for c in itertools.product(range(5), repeat=count) if sum(costs[i][k] for i, k in enumerate(c)) <= kept]
    if not every:
        with pytest.raises(ValueError, match="the highest sparsity keeps more"):
            allocate_sparsity(sizes, most, SPARSITIES, losses, kept)
        return
    found = allocate_sparsity(sizes, most, SPARSITIES, losses, kept)
    assert sum(found) == min(kept, sum(most))
    assert all(n <= m for n, m in zip(found, most, strict=True))

    def loss(choice):
        return sum(slow_interpolated(fine[k], losses[i]) for i, k in enumerate(choice))

    best = min(loss(choice) for choice in every)
    # what was found keeps at least as much of each matrix as some best choice
    good = [c for c in every if loss(c) <= best * (1 + 1e-9)]
    assert any(all(costs[i][k] <= found[i] for i, k in enumerate(c)) for c in good)


def test_interpolate_loss_between_measured_points():
    assert interpolate_loss([0.4, 0.6], [1.0, 4.0], 0.5) == pytest.approx(2)
    assert interpolate_loss([0.4, 0.6, 0.8], [1.0, 4.0, 8.0], 0.7) == pytest.approx(math.sqrt(32))
    assert interpolate_loss([0.4, 0.6], [0.0, 0.0], 0.4) <= 1e-29
