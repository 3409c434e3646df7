from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.solvers.obs import keep_by_score, least_squares, obs_prune_groups


def problem(outputs: int, inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = mix @ torch.randn(inputs, 20 * inputs, generator=generator, dtype=torch.float64)
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x @ x.T, x


@given(st.integers(2, 12), st.integers(3, 12), st.data())
def test_least_squares_matches_lstsq(outputs, inputs, data):
    weight, hessian, x = problem(outputs, inputs, data.draw(st.integers(0, 99)))
    stay = torch.tensor(sorted(data.draw(st.sets(st.integers(0, inputs - 1), min_size=1))))
    found = least_squares(weight, hessian, stay)
    # rows √λ·I below X: the penalty on what moves, as in the docstring
    penalty = (0.001 * hessian.diagonal().mean()).sqrt()
    wide = torch.cat([x, penalty * torch.eye(inputs, dtype=x.dtype)], 1)
    expected = torch.linalg.lstsq(wide[stay].T, (weight @ wide).T).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    if len(stay) == inputs:
        torch.testing.assert_close(found, weight)


def cost(weight: torch.Tensor, hessian: torch.Tensor, kept: list[int]) -> float:
    """||WX - VX_S||² with the best V, H damped as the solver damps it."""
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    target = weight @ damped
    best = torch.linalg.solve(damped[kept][:, kept], target[:, kept].T).T
    full = torch.zeros_like(weight)
    full[:, kept] = best
    return float(((weight - full) @ damped * (weight - full)).sum())


@pytest.mark.parametrize(("width", "runs"), [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_obs_prune_groups_removes_least_cost_at_each_step(width, runs):
    """Against trying every unit, solving anew each time."""
    weight, hessian, _ = problem(5, 12, seed=width + runs)
    units = 12 // width
    alive = list(range(units))
    quota = [2 // runs] * runs if runs > 1 else [2]
    for _ in range(2):
        costs = {}
        for unit in alive:
            if quota[unit // (units // runs)]:
                kept = [u * width + w for u in alive if u != unit for w in range(width)]
                costs[unit] = cost(weight, hessian, kept)
        gone = min(costs, key=lambda u: costs[u])
        quota[gone // (units // runs)] -= 1
        alive.remove(gone)
    assert obs_prune_groups(weight, hessian, 2, width=width, runs=runs) == alive


@pytest.mark.slow
def test_obs_prune_groups_nears_one_by_one_when_many_units():
    """Above 256 units several go in each step; the cost is close to that of one by one."""
    weight, hessian, _ = problem(8, 400, seed=0)
    several = cost(weight, hessian, obs_prune_groups(weight, hessian, 300))
    first = weight, hessian
    alone = cost(*first, _one_by_one(*first, 300))
    assert several < 1.1 * alone


def _one_by_one(weight: torch.Tensor, hessian: torch.Tensor, remove: int) -> list[int]:
    alive = list(range(weight.shape[1]))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    moved, inverse = weight.clone(), torch.linalg.inv(damped)
    for _ in range(remove):
        gone = min(alive, key=lambda i: float(moved[:, i].square().sum() / inverse[i, i]))
        moved = moved - torch.outer(moved[:, gone], inverse[gone]) / inverse[gone, gone]
        inverse = inverse - torch.outer(inverse[:, gone], inverse[gone]) / inverse[gone, gone]
        alive.remove(gone)
    return alive


def test_obs_prune_groups_nears_best_three_of_six():
    weight, hessian, _ = problem(4, 6, seed=3)
    best = min(cost(weight, hessian, list(kept)) for kept in itertools.combinations(range(6), 3))
    assert cost(weight, hessian, obs_prune_groups(weight, hessian, 3)) < 1.5 * best


def test_keep_by_score_keeps_best_within_runs():
    score = torch.tensor([1.0, 2.0, 3.0, 30.0, 20.0, 10.0])
    assert keep_by_score(score, 2) == [2, 3, 4, 5]
    assert keep_by_score(score, 2, runs=2) == [1, 2, 3, 4]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_least_squares_refuses_overflowed_sums(wrong):
    weight, hessian, _ = problem(3, 4, seed=0)
    hessian[1, 1] = wrong
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        least_squares(weight, hessian, torch.tensor([0, 1]))
