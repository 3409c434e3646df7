"""ALPS against the paper's iteration with explicit inverses, against every support of a small problem, and SparseGPT."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.solvers.alps import _CHECK, _RHO, LayerProblem, _admm, _Projection, alps, problem, solve_support
from compress.solvers.hessian import damped, inverse_factor
from compress.solvers.sparsegpt import sparsegpt
from tests.toolbox import gram

SEEDS = st.integers(0, 10_000)
TARGETS = st.one_of(st.floats(0.1, 0.9), st.sampled_from([(1, 2), (2, 4), (5, 8)]))


def layer(seed, rows, columns, target, with_mask):
    generator = torch.Generator().manual_seed(seed)
    pattern = target if isinstance(target, tuple) else None
    columns = columns if pattern is None else max(1, columns // pattern[1]) * pattern[1]
    W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    earlier = torch.rand(rows, columns, generator=generator) < 0.8 if with_mask else None
    if pattern is not None:
        return W, gram(seed, 3 * columns, columns), None, pattern, earlier
    alive = W.numel() if earlier is None else int(earlier.sum())
    return W, gram(seed, 3 * columns, columns), int(target * alive), None, earlier


def slow_mask(Z, kept, pattern, earlier):
    """The largest by sorting."""
    mask = torch.zeros_like(Z, dtype=torch.bool)
    alive = [(i, j) for i in range(Z.shape[0]) for j in range(Z.shape[1]) if earlier is None or earlier[i, j]]
    groups: dict = {}
    for i, j in alive:
        groups.setdefault(0 if pattern is None else (i, j // pattern[1]), []).append((i, j))
    for members in groups.values():
        for k in sorted(members, key=lambda k: -abs(float(Z[k])))[: kept if pattern is None else pattern[0]]:
            mask[k] = True
    return mask


def slow_admm(target, X, kept, pattern, earlier, iterations):
    """Equation 5 of the paper: B from a ridge problem, D by projection, V by its gradient step; rho grows as in the solver."""
    rho, V = _RHO, torch.zeros_like(target)
    D = target * slow_mask(target, kept, pattern, earlier)
    for iteration in range(1, iterations + 1):
        B = (target @ X - V + rho * D) @ torch.linalg.inv(X + rho * torch.eye(len(X), dtype=X.dtype))
        Z = B + V / rho
        D = Z * slow_mask(Z, kept, pattern, earlier)
        V = V + rho * (B - D)
        if iteration % _CHECK == 0:
            rho *= 1.15
    return B


def slow_solve(W, H, mask):
    """Each row alone, by the normal equations."""
    result = torch.zeros_like(W)
    for i in range(len(W)):
        S = torch.nonzero(mask[i]).flatten()
        if len(S):
            result[i, S] = torch.linalg.solve(H[S][:, S], (H @ W[i])[S])
    return result


def error(W, other, H):
    off = (W - other).double()
    return float(((off @ H.double()) * off).sum())


@given(SEEDS, st.integers(1, 5), st.integers(2, 12), TARGETS, st.booleans())
def test_admm_matches_slow_twin(seed, rows, columns, target, with_mask):
    W, H, kept, pattern, earlier = layer(seed, rows, columns, target, with_mask)
    H = damped(H)[0]
    scale = torch.linalg.inv(H).diagonal().rsqrt()
    X = H / scale / scale[:, None]
    scaled = W * scale if earlier is None else W * scale * earlier
    if kept == 0:
        return
    # too few iterations for the rule that stops
    this, project = LayerProblem(X, scale, 0.01), _Projection(kept, pattern, earlier)
    found = _admm(scaled, this, project, 2 * _CHECK - 1, 1.15)
    expected = slow_admm(scaled, X, kept, pattern, earlier, 2 * _CHECK - 1)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)


@given(SEEDS, st.integers(1, 8), st.integers(2, 30), TARGETS, st.booleans(), st.integers(0, 3))
def test_admm_projection_matches_exact_mask_when_weights_change_slowly(seed, rows, columns, target, with_mask, pace):
    Z, _, kept, pattern, earlier = layer(seed, rows, columns, target, with_mask)
    project = _Projection(kept, pattern, earlier)
    for step in range(6):
        if pattern is None:
            project.take(Z.clone())
        D = project(Z, slice(None), torch.empty_like(Z))
        assert torch.equal(D, Z * slow_mask(Z, kept, pattern, earlier))
        generator = torch.Generator().manual_seed(seed + step)
        Z = Z + 10.0 ** -(1 + pace) * torch.randn(Z.shape, generator=generator, dtype=Z.dtype)


def test_thresholds_of_a_large_matrix_follow_its_weights():
    generator = torch.Generator().manual_seed(0)
    Z, kept = torch.randn(300, 300, generator=generator), 40_000
    project, searched = _Projection(kept, None, None), []
    search = project._threshold
    project._threshold = lambda size: searched.append(1) or search(size)
    for step in range(40):
        if step % 10 == 9:
            Z = Z * 0.9
            project.grown()
        project.take(Z.clone())
        D = project(Z, slice(None), torch.empty_like(Z))
        assert int((D != 0).sum()) == pytest.approx(kept, rel=0.003)
        Z = Z + 0.003 * torch.randn(Z.shape, generator=generator)
    assert len(searched) < 10


@given(SEEDS, st.integers(1, 5), st.integers(1, 12), TARGETS, st.booleans())
def test_alps_keeps_asked_count_and_solves_least_squares(seed, rows, columns, target, with_mask):
    W, H, kept, pattern, earlier = layer(seed, rows, columns, target, with_mask)
    before = W.clone(), H.clone(), None if earlier is None else earlier.clone()
    found, mask = alps(W, H, kept=kept, pattern=pattern, earlier=earlier, pcg_iterations=50)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])
    assert earlier is None or torch.equal(earlier, before[2])
    assert found.dtype == W.dtype
    assert not bool((found != 0)[~mask].any())
    if earlier is not None:
        assert not bool((mask & ~earlier).any())
        W = W * earlier
    if kept is not None:
        assert int(mask.sum()) == kept
    else:
        m = pattern[1]
        alive = torch.ones_like(mask) if earlier is None else earlier
        assert torch.equal(mask.view(-1, m).sum(1), alive.view(-1, m).sum(1).clamp(max=pattern[0]))
    H = damped(H)[0]
    best = error(W, slow_solve(W, H, mask), H)
    assert error(W, found, H) <= best * 1.01 + 1e-4 * error(W, 0 * W, H)


def test_alps_beats_sparsegpt_and_nears_best_support():
    ratios, excess = [], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        W, H = torch.randn(32, 48, generator=generator), gram(seed, 200, 48, torch.float32)
        kept = W.numel() // 2
        ours, mask = alps(W, H, kept=kept)
        assert int(mask.sum()) == kept
        ratios.append(error(W, ours, H) / error(W, sparsegpt(W, inverse_factor(H)[0], sparsity=0.5)[0], H))
        W, X = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((1, 8), (40, 8)))
        X += torch.randn(40, 1, generator=generator)
        H = damped(X.T @ X)[0]
        every = []
        for support in itertools.combinations(range(8), 4):
            chosen = torch.zeros(1, 8, dtype=torch.bool)
            chosen[0, list(support)] = True
            every.append(error(W, slow_solve(W, H, chosen), H))
        ours, mask = alps(W, H, kept=4, damp=0)
        excess.append(error(W, ours, H) / min(every))
    assert sum(ratios) / len(ratios) < 0.7
    assert sum(excess) / len(excess) < 1.1


def test_alps_at_no_and_full_sparsity():
    W, H, *_ = layer(0, 4, 8, 0.5, False)
    earlier = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    for kept in (int(earlier.sum()), 32):
        found, mask = alps(W, H, kept=kept, earlier=earlier)
        assert torch.equal(mask, earlier)
        assert torch.equal(found, W * earlier)
    found, mask = alps(W, H, kept=32)
    assert bool(mask.all())
    assert torch.equal(found, W)
    found, mask = alps(W, H, kept=0)
    assert not bool(mask.any())
    assert not bool(found.any())


def test_problem_is_shared_by_matrices_of_other_dtypes():
    W, H, *_ = layer(1, 6, 16, 0.5, False)
    shared = problem(H.float())
    assert shared.damping == 0.01
    found, mask = alps(W.bfloat16(), shared, kept=48)
    again, same = alps(W.bfloat16(), H.float(), kept=48)
    assert torch.equal(mask, same)
    assert torch.equal(found, again)
    assert found.dtype == torch.bfloat16


def test_problem_refuses_bad_hessians():
    W = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    raised = problem(torch.diag(torch.tensor([-30.0, *[1.0] * 7])))
    assert math.isinf(raised.damping)
    found, mask = alps(W, raised, kept=16)
    assert bool(found.isfinite().all())
    assert int(mask.sum()) == 16
    dead = gram(0, 20, 8, torch.float32)
    dead[3] = dead[:, 3] = 0
    found, mask = alps(W, dead, kept=16)
    assert bool(found.isfinite().all())
    assert not bool(mask[:, 3].any())
    with pytest.raises(ValueError, match="holds NaN"):
        alps(W, torch.full((8, 8), math.nan), kept=16)
    for both in ({}, {"kept": 16, "pattern": (2, 4)}):
        with pytest.raises(ValueError, match="either kept or pattern"):
            alps(W, dead, **both)


@given(SEEDS, st.integers(1, 6), st.integers(1, 16), st.booleans(), st.sampled_from([0.0, 0.01]))
def test_solve_support_matches_slow_solve(seed, rows, columns, double, damp):
    W, H, *_ = layer(seed, rows, columns, 0.5, False)
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.6
    expected = slow_solve(W, damped(H, damp)[0], mask)
    if double:
        found = solve_support(W, H, mask, damp)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    else:
        found = solve_support(W.float(), H.float(), mask, damp)
        least, most = error(W, expected, H), error(W, 0 * W, H)
        assert error(W, found, H) <= least * 1.01 + 1e-4 * most
    assert not bool((found != 0)[~mask].any())
