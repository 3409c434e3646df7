"""Damping and the factor of the inverse against explicit inverses in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.solvers.hessian import damped, inverse_factor
from tests.toolbox import gram

SEEDS = st.integers(0, 10_000)


def slow_damped(H: torch.Tensor, damp: float) -> torch.Tensor:
    alive = [float(H[j, j]) for j in range(len(H)) if H[j, j] != 0]
    extra = damp * sum(alive) / max(1, len(alive))
    result = H.clone()
    for j in range(len(H)):
        result[j, j] = float(H[j, j]) + extra or 1.0
    return result


@given(SEEDS, st.integers(1, 9), st.sets(st.integers(0, 8)), st.sampled_from([0.0, 0.01, 1.0]))
def test_damped_matches_slow_twin(seed, inputs, dead, damp):
    H = gram(seed, 2 * inputs, inputs)
    for j in dead & set(range(inputs)):
        H[j] = H[:, j] = 0
    before = H.clone()
    result, found = damped(H, damp)
    assert torch.equal(H, before)
    assert set(torch.nonzero(found).flatten().tolist()) == dead & set(range(inputs))
    torch.testing.assert_close(result, slow_damped(H, damp))


@given(SEEDS, st.integers(1, 12), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_inverse_factor_matches_slow_twin(seed, inputs, deficient, dtype):
    H = gram(seed, inputs // 2 + 1 if deficient else 3 * inputs, inputs, dtype)
    before = H.clone()
    U, used = inverse_factor(H, 0.01)
    assert used == 0.01
    assert torch.equal(H, before)
    assert U.dtype == dtype
    assert torch.equal(U, U.triu())
    assert bool((U.diagonal() > 0).all())
    unit = (U.double().T @ U.double()) @ slow_damped(H.double(), 0.01)
    torch.testing.assert_close(unit, torch.eye(inputs, dtype=torch.float64), atol=1e-2 if deficient else 1e-3, rtol=0)


def test_inverse_factor_gives_dead_inputs_least_weight_at_any_scale():
    for scale in (1e-6, 1.0, 1e6):
        H = gram(0, 20, 6) * scale
        H[2] = H[:, 2] = 0
        U, used = inverse_factor(H)
        assert used == 0.01
        assert int((1 / U.diagonal()).argmin()) == 2
    U, used = inverse_factor(torch.zeros(3, 3))
    assert torch.equal(U, torch.eye(3))


@pytest.mark.parametrize(("least", "expected"), [(-0.001, 0.01), (-0.05, 0.1), (-0.5, 1.0), (-20.0, math.inf)])
def test_inverse_factor_raises_damping_until_it_factors(least, expected):
    Q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    values = torch.tensor([least, *[1.0] * 7], dtype=torch.float64)
    H = (Q * values) @ Q.T
    H = (H + H.T) / 2
    U, used = inverse_factor(H)
    assert used == expected
    assert torch.equal(U, U.triu())
    assert bool((U.diagonal() > 0).all())
    if math.isinf(used):
        floor = 0.01 * float(H.diagonal().abs().mean())
        H = (Q * values.clamp(min=floor)) @ Q.T
    else:
        H = slow_damped(H, used)
    torch.testing.assert_close(U.T @ U @ H, torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_inverse_factor_refuses_non_finite_hessian(bad):
    H = torch.eye(4)
    H[1, 2] = bad
    with pytest.raises(ValueError, match=r"H \[4, 4\] holds NaN or infinite values; check the calibration inputs"):
        inverse_factor(H)
