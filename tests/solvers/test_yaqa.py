"""Codes and scales in view of the curvature by outputs: what they lower, that nothing single is left to gain, and where they stay."""

from __future__ import annotations

import itertools

import pytest
import torch

from compress.solvers.gptq import gptq, ordered_factor
from compress.solvers.hessian import damped
from compress.solvers.quant_format import Scales, code_range, code_values, fit
from compress.solvers.quantease import refine
from compress.solvers.yaqa import _compatible, coupled_error, gptq_coupled, refine_coupled, shrunk
from compress.spec.formats import Grid
from tests.solvers.test_quantease import layer


def curvature(outputs, seed=0):
    """Of outputs that hang together."""
    G = torch.randn(4 * outputs, outputs, generator=torch.Generator().manual_seed(seed + 10))
    return shrunk((lambda X: X.T @ X)(G @ (torch.eye(outputs) + torch.ones(outputs, outputs) / 3)))


def cost(W, codes, scales, H, F):
    """tr(F E H Eᵀ), float64."""
    error = W.double() - codes.double() * scales.scale.double().repeat_interleave(
        W.shape[1] // scales.scale.shape[1], 1
    )
    return float(((F.double() @ error @ H.double()) * error).sum())


def start(grid, pruned=False, outputs=7):
    W, X = layer(outputs)
    H = damped((X.T @ X).double())[0].float()
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(3)) < 0.7 if pruned else None
    scales = fit(W, grid, H.diagonal(), keep)
    codes, scales = refine(W, W, H, grid, scales, keep, rounds=3)
    return W, H, keep, codes, scales


GRIDS = [Grid("int3", 8), Grid("int2", 0), Grid("int3", 12, False), Grid("mxfp4", 8), Grid("fp8", 0)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("pruned", [False, True])
def test_it_lowers_what_it_is_to_lower_until_no_single_code_helps(grid, pruned):
    W, H, keep, codes, scales = start(grid, pruned)
    F = curvature(len(W))
    costs = [cost(W, codes, scales, H, F)]
    given = codes.clone()
    for _ in range(24):
        codes, scales = refine_coupled(W, codes, H, F, grid, scales, keep, rounds=1)
        costs.append(cost(W, codes, scales, H, F))
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(costs)), costs
    assert costs[-1] < 0.97 * costs[0] or grid.format == "fp8"
    assert not torch.equal(codes, given)
    if keep is not None:
        assert (codes[~keep] == 0).all()
    if grid.is_integer:
        low, high = code_range(grid)
        zero = torch.zeros_like(codes) if scales.zero is None else scales.zero.repeat_interleave(grid.group, 1)
        stored = codes + zero
        assert (stored == stored.round()).all()
        assert low <= stored[keep if keep is not None else ...].min() <= stored.max() <= high
        for o, i, step in itertools.product(range(len(W)), range(W.shape[1]), (-1, 1)):
            if low <= stored[o, i] + step <= high and (keep is None or keep[o, i]):
                other = codes.clone()
                other[o, i] += step
                assert cost(W, other, scales, H, F) >= costs[-1] * (1 - 1e-5), (o, i, step)
    else:
        values = codes * scales.scale.repeat_interleave(grid.group or W.shape[1], 1)
        assert torch.equal(codes, code_values(values, grid, scales))


def rounded_one_by_one(W, H, F, order_I, grid, scales, keep):
    """GPTQ on the whole matrix as one vector, input by input and in each output by output, with the Kronecker product itself."""
    order_O = torch.argsort(F.diagonal(), descending=True, stable=True)
    outputs, size = len(W), W.shape[1] // scales.scale.shape[1]
    whole = torch.kron(H[order_I][:, order_I].double(), F[order_O][:, order_O].double())
    U = torch.linalg.cholesky(torch.linalg.inv(whole)).T
    low, high = code_range(grid)
    left = W.t()[order_I][:, order_O].double().flatten().clone()
    codes = torch.zeros_like(W)
    for k in range(len(left)):
        i, o = int(order_I[k // outputs]), int(order_O[k % outputs])
        scale = float(scales.scale[o, i // size])
        zero = 0.0 if scales.zero is None else float(scales.zero[o, i // size])
        code = min(max(round(float(left[k]) / scale + zero), low), high) - zero
        codes[o, i] = code if keep is None or keep[o, i] else 0.0
        left[k:] -= (left[k] - float(codes[o, i]) * scale) / U[k, k] * U[k, k:]
    return codes


@pytest.mark.parametrize("grid", [Grid("int3", 8), Grid("int4", 12, False), Grid("int2", 0)], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 24), (40, 24), (33, 48), (5, 72)])
@pytest.mark.parametrize("pruned", [False, True])
def test_rounding_by_diagonals_is_gptq_on_the_kronecker_product(grid, outputs, inputs, pruned):
    W, X = layer(outputs, inputs)
    H = damped((X.T @ X).double())[0]
    F = curvature(outputs)
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(3)) < 0.7 if pruned else None
    scales = fit(W, grid, H.diagonal(), keep)
    order, U, _ = ordered_factor(H, 0.0)
    found = gptq_coupled(
        W.double(), U, order, F.double(), grid, Scales(*(t if t is None else t.double() for t in scales)), keep
    )
    wanted = rounded_one_by_one(W, H, F, order, grid, scales, keep)
    assert (found != wanted).float().mean() <= 0.002  # the inverse of F has a millionth of damping
    if keep is not None:
        assert (found[~keep] == 0).all()
    plain = code_values(gptq(W, U.float(), order, grid, scales, keep), grid, scales, keep)
    error = coupled_error(W, found.float(), scales, H.float(), F)
    assert error == pytest.approx(cost(W, found, scales, H, F), rel=1e-3)
    assert error < coupled_error(W, plain, scales, H.float(), F)


def test_outputs_that_do_not_hang_together_are_left_as_descent_leaves_them():
    grid = Grid("int3", 8)
    W, X = layer(6)
    H = damped((X.T @ X).double())[0].float()
    codes, scales = refine(W, W, H, grid, fit(W, grid, H.diagonal()), rounds=60)
    found, moved = refine_coupled(W, codes, H, torch.eye(6) * 3, grid, scales)
    assert torch.equal(found, codes)
    torch.testing.assert_close(moved.scale, scales.scale, rtol=1e-3, atol=1e-6)


def test_steps_kept_together_are_each_worth_it():
    """What is kept lowers the sum, and leaving out any one of it does not lower it more."""
    generator = torch.Generator().manual_seed(0)
    dropped = 0
    for trial in range(50):
        F = curvature(6, trial)
        slope = torch.randn(6, generator=generator)

        def change(step, at, F=F, slope=slope):
            return 0.5 * float(step @ F[at][:, at] @ step) - 2 * float(slope[at] @ step)

        best = 2 * slope / F.diagonal()  # what each output alone would like
        at = torch.arange(6)
        kept, step = _compatible(at, best, slope, 0.5, F)
        dropped += 6 - len(kept)
        assert len(kept)
        assert torch.equal(step, best[kept])
        assert change(step, kept) < 0
        for k in range(len(kept)):
            rest = torch.arange(len(kept)) != k
            assert change(step[rest], kept[rest]) >= change(step, kept) - 1e-5
    assert dropped


def test_a_curvature_of_nothing_is_no_division_by_zero():
    assert torch.equal(shrunk(torch.zeros(3, 3)), 0.05 * torch.eye(3))
