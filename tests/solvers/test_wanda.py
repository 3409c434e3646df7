"""Wanda against a row by row twin."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.solvers.wanda import keep_wanda


def slow_keep(scores: list[float], kept: int, earlier: list[bool]) -> list[bool]:
    alive = [j for j in range(len(scores)) if earlier[j]]
    best = set(sorted(alive, key=lambda j: (-scores[j], j))[:kept])
    return [j in best for j in range(len(scores))]


@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.integers(1, 12),
    st.one_of(st.floats(0, 1), st.sampled_from([(1, 2), (2, 4), (3, 8)])),
    st.booleans(),
    st.booleans(),
)
def test_keep_wanda_matches_slow_twin(seed, rows, columns, target, ties, with_mask):
    generator = torch.Generator().manual_seed(seed)
    if isinstance(target, tuple):
        columns *= target[1]
    W = torch.randn(rows, columns, generator=generator)
    norms = torch.randint(0, 4, (columns,), generator=generator).float() if ties else torch.rand(columns) + 0.5
    if ties:
        W = (W * 2).round() / 2
    earlier = torch.rand(rows, columns, generator=generator) < 0.6
    by_row = isinstance(target, float)
    mask = keep_wanda(
        W, norms**2, target if by_row else None, None if by_row else target, earlier if with_mask else None
    )
    assert mask.dtype == torch.bool
    for row in range(rows):
        alive = earlier[row].tolist() if with_mask else [True] * columns
        scores = [abs(float(W[row, j])) * float((norms**2)[j].sqrt()) for j in range(columns)]
        if by_row:
            expected = slow_keep(scores, columns - round(target * columns), alive)
        else:
            n, m = target
            expected = []
            for k in range(0, columns, m):
                expected += slow_keep(scores[k : k + m], n, alive[k : k + m])
        assert mask[row].tolist() == expected


def test_keep_wanda_follows_inputs_in_any_dtype():
    W = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.bfloat16)
    diagonal = torch.tensor([100.0, 1.0, 4.0, 0.0], dtype=torch.float64)
    assert keep_wanda(W, diagonal, 0.5).tolist() == [[True, False, True, False]]
    assert math.isclose(float(keep_wanda(W, diagonal, 1.0).sum()), 0)


def test_keep_wanda_takes_one_target():
    for both in ({}, {"sparsity": 0.5, "pattern": (2, 4)}):
        with pytest.raises(ValueError, match="either sparsity or pattern"):
            keep_wanda(torch.ones(2, 4), torch.ones(4), **both)
