"""SparseGPT against the paper's column by column update with explicit inverses in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.solvers.hessian import damped, inverse_factor
from compress.solvers.sparsegpt import sparsegpt
from tests.toolbox import gram

SEEDS = st.integers(0, 10_000)


def slow_sparsegpt(W, H, sparsity, pattern, blocksize, earlier):
    """Equation 3 and algorithm 1: the inverse of the Hessian of the columns from j on decides on column j."""
    rows, columns = W.shape
    W = W.clone() if earlier is None else W * earlier
    keep = torch.ones(rows, columns, dtype=torch.bool) if earlier is None else earlier.clone()
    dead = rows * columns - int(keep.sum())
    alive = [int(keep[:, :e].sum()) for e in range(columns + 1)]
    inverse = [torch.linalg.inv(H[j:, j:]) for j in range(columns)]
    rate = 0.0
    if sparsity is not None and alive[-1]:
        rate = max(0, round(sparsity * rows * columns) - dead) / alive[-1] if dead else sparsity
    if pattern is not None:
        blocksize = pattern[1]
    for start in range(0, columns, blocksize):
        stop = min(start + blocksize, columns)
        score = {(i, j): float(W[i, j] ** 2 / inverse[j][0, 0]) for i in range(rows) for j in range(start, stop)}
        if pattern is None:
            count = round(rate * alive[stop]) - round(rate * alive[start])
            order = sorted((k for k in score if keep[k]), key=lambda k: (score[k], -k[1], -k[0]))
            for k in order[:count]:
                keep[k] = False
        else:
            for i in range(rows):
                order = sorted((k for k in score if k[0] == i and keep[k]), key=lambda k: (score[k], -k[1]))
                for k in order[: max(0, len(order) - pattern[0])]:
                    keep[k] = False
        for j in range(start, stop):
            for i in range(rows):
                if not keep[i, j]:
                    W[i, j:] = W[i, j:] - W[i, j] / inverse[j][0, 0] * inverse[j][0]
                    W[i, j] = 0
    return W, keep


@given(
    SEEDS,
    st.integers(1, 5),
    st.integers(1, 20),
    st.one_of(st.floats(0, 1), st.sampled_from([(1, 2), (2, 4), (5, 8)])),
    st.sampled_from([1, 3, 8, 128]),
    st.booleans(),
)
def test_sparsegpt_matches_slow_twin(seed, rows, columns, target, blocksize, with_mask):
    generator = torch.Generator().manual_seed(seed)
    sparsity, pattern = (target, None) if isinstance(target, float) else (None, target)
    if pattern is not None:
        columns = max(1, columns // pattern[1]) * pattern[1]
    W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    H = gram(seed, 3 * columns, columns)
    earlier = torch.rand(rows, columns, generator=generator) < 0.7 if with_mask else None
    before = W.clone(), None if earlier is None else earlier.clone()
    U, _ = inverse_factor(H)
    found, mask = sparsegpt(W, U, sparsity=sparsity, pattern=pattern, blocksize=blocksize, earlier=earlier)
    expected, expected_mask = slow_sparsegpt(W, damped(H)[0], sparsity, pattern, blocksize, earlier)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert not bool((found != 0)[~mask].any())
    assert torch.equal(W, before[0])
    assert earlier is None or torch.equal(earlier, before[1])
    if sparsity is not None:
        gone = round(sparsity * W.numel())
        assert int((~mask).sum()) == (gone if earlier is None else max(gone, int((~earlier).sum())))


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(SEEDS, st.booleans())
def test_sparsegpt_matches_slow_twin_when_matrix_is_wide(seed, structured):
    """Over 32 columns, where updates are gathered, and with ties among zeros."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(3, 80, generator=generator, dtype=torch.float64)
    W[:, ::3] = 0
    H = gram(seed, 200, 80)
    target = {"sparsity": None, "pattern": (2, 4)} if structured else {"sparsity": 0.6, "pattern": None}
    found, mask = sparsegpt(W, inverse_factor(H)[0], **target, blocksize=64)
    expected, expected_mask = slow_sparsegpt(W, damped(H)[0], **target, blocksize=64, earlier=None)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_sparsegpt_keeps_dtype_and_takes_one_target():
    U, _ = inverse_factor(gram(0, 40, 8, torch.float32))
    found, mask = sparsegpt(torch.randn(4, 8).bfloat16(), U, sparsity=0.5)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
    assert mask.is_contiguous()
    for both in ({}, {"sparsity": 0.5, "pattern": (2, 4)}):
        with pytest.raises(ValueError, match="either sparsity or pattern"):
            sparsegpt(torch.ones(2, 8), U, **both)
