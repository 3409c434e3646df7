"""Masks against slow twins that follow the definition."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.checkpoint.values import Value
from compress.solvers.magnitude import global_counts, keep_largest, keep_n_of_m

SEEDS = st.integers(0, 10_000)


def matrix(seed: int, rows: int, columns: int, *, ties: bool) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (values * 2).round() / 2 if ties else values


def slow_keep(values: list[float], kept: int, earlier: list[bool] | None) -> list[bool]:
    """Sort by magnitude, the first of equals before the others; what is masked already goes last."""
    alive = [i for i in range(len(values)) if earlier is None or earlier[i]]
    best = set(sorted(alive, key=lambda i: (-abs(values[i]), i))[:kept])
    return [i in best for i in range(len(values))]


@given(SEEDS, st.integers(1, 7), st.integers(1, 9), st.booleans(), st.booleans(), st.data())
def test_keep_largest_matches_slow_twin(seed, rows, columns, ties, with_mask, data):
    values = matrix(seed, rows, columns, ties=ties)
    earlier = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) < 0.7 if with_mask else None
    kept = data.draw(st.integers(0, rows * columns))
    expected = slow_keep(values.flatten().tolist(), kept, None if earlier is None else earlier.flatten().tolist())
    assert keep_largest(values, kept, earlier).flatten().tolist() == expected


@given(
    SEEDS, st.integers(1, 5), st.integers(1, 4), st.sampled_from([(1, 2), (2, 4), (3, 8)]), st.booleans(), st.booleans()
)
def test_keep_n_of_m_matches_slow_twin(seed, rows, groups, pattern, ties, with_mask):
    n, m = pattern
    values = matrix(seed, rows, groups * m, ties=ties)
    earlier = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.7 if with_mask else None
    mask = keep_n_of_m(values, n, m, -1, earlier)
    for row in range(rows):
        for start in range(0, groups * m, m):
            piece = slice(start, start + m)
            old = None if earlier is None else earlier[row, piece].tolist()
            assert mask[row, piece].tolist() == slow_keep(values[row, piece].tolist(), n, old)
    transposed = keep_n_of_m(values.T, n, m, 0, None if earlier is None else earlier.T)
    assert torch.equal(transposed, mask.T)


@given(SEEDS, st.integers(1, 4), st.booleans(), st.booleans(), st.data())
def test_global_counts_match_one_threshold(seed, tensors, ties, with_mask, data):
    store = {}
    for i in range(tensors):
        values = matrix(seed + i, 3, 4 + i, ties=ties)
        mask = (
            torch.rand(values.shape, generator=torch.Generator().manual_seed(seed + 50 + i)) < 0.7
            if with_mask
            else None
        )
        store[f"t{i}"] = Value(values, mask)
    flat = [(abs(v), name) for name, x in store.items() for v, alive in zip(
        x.data.flatten().tolist(), (x.mask if x.mask is not None else torch.ones_like(x.data, dtype=torch.bool)).flatten().tolist(), strict=True
    ) if alive]  # fmt: skip
    kept = data.draw(st.integers(0, len(flat)))
    best = sorted(range(len(flat)), key=lambda i: (-flat[i][0], i))[:kept]
    expected = {name: sum(flat[i][1] == name for i in best) for name in store}
    assert global_counts(store.__getitem__, list(store), kept) == expected


def test_keep_largest_of_bfloat16_and_extreme_values():
    values = torch.tensor([0.0, -0.0, 1e-38, -3e38, float("inf"), 2.0], dtype=torch.bfloat16)
    assert keep_largest(values, 3).tolist() == [False, False, False, True, True, True]
