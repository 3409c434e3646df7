"""Ridge regression with held-out tokens."""

from __future__ import annotations

import pytest
import torch

from compress.solvers.ridge import RegressionSums, ridge_change

OUT, IN = 5, 12


def sums(x, r):
    result = RegressionSums.empty(OUT, IN, torch.float64, "cpu")
    result.add(x, r)
    return result


def drawn(tokens, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(9))
    x = torch.randn(tokens, IN, generator=generator)
    return x, x @ wanted.T + noise * torch.randn(tokens, OUT, generator=generator), wanted


def test_change_is_the_ridge_solution_of_all_tokens():
    (x, r, wanted), (y, s, _) = drawn(200, 0.1, 0), drawn(40, 0.1, 1)
    change = ridge_change(sums(x, r), sums(y, s), lambda D: D)
    assert torch.allclose(change, wanted.double(), atol=0.05)
    inputs, outputs = torch.cat([x, y]).double(), torch.cat([r, s]).double()
    ridge = 0.001 * inputs.square().sum() / IN  # the least one: there is little noise
    rows = torch.cat([inputs, ridge.sqrt() * torch.eye(IN, dtype=torch.float64)])
    padded = torch.cat([outputs, outputs.new_zeros(IN, OUT)])
    assert torch.allclose(change, torch.linalg.lstsq(rows, padded).solution.T, atol=1e-5)


def test_energy_left_is_that_of_the_tokens():
    x, r, wanted = drawn(30, 0.5, 0)
    left = sums(x, r).left((0.7 * wanted).double())
    assert left == pytest.approx(float((r - x @ (0.7 * wanted).T).square().sum()), rel=1e-5)


def test_few_noisy_tokens_take_a_large_ridge_or_none():
    (x, r, _), (y, s, _) = drawn(13, 4, 0), drawn(400, 4, 1)
    change = ridge_change(sums(x, r), sums(y, s), lambda D: D)
    least = torch.linalg.lstsq(x, r).solution.T.double()
    held = sums(y, s)
    assert held.left(least) > held.energy  # least squares alone does harm
    assert change is None or sums(torch.cat([x, y]), torch.cat([r, s])).left(change) < held.energy + sums(x, r).energy
    noise = torch.randn(400, OUT, generator=torch.Generator().manual_seed(2))
    assert ridge_change(sums(x, r), sums(y, noise), lambda D: D) is None


def test_what_must_stay_is_kept():
    (x, r, _), (y, s, _) = drawn(200, 0.1, 0), drawn(40, 0.1, 1)
    mask = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(0)) < 0.5
    change = ridge_change(sums(x, r), sums(y, s), lambda D: D.masked_fill(mask, 0))
    assert bool((change[mask] == 0).all())
    assert bool((change[~mask] != 0).all())
