"""Trellis-coded quantisation against a search of all sequences, and its limits."""

from __future__ import annotations

import itertools

import pytest
import torch

from compress.checkpoint.storage.trellis import rotate, sequences, state_values, states_of
from compress.solvers.gptq import act_order_factor
from compress.solvers.trellis import TrellisCoder, likely_error, trellis_gptq, trellis_nearest, values_of


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_path_is_the_best_of_all_sequences() -> None:
    """All 256 states before it x 64 codes are tried for three weights of two bits."""
    x, weight = random(3, 2), random(3, 2, seed=1).abs() + 0.1
    codes = torch.tensor(list(itertools.product(range(4), repeat=3)))
    low = torch.arange(256)[:, None].expand(256, 64)
    error = torch.zeros(256, 64, 2)
    for n in range(3):
        state = low * 4 + codes[:, n]
        error += weight[n] * (x[n] - state_values()[state][..., None]).square()
        low = state % 256
    found = TrellisCoder(2, x.device)._path(x, weight, None)
    assert all((found[n] // 4 == found[n - 1] % 256).all() for n in (1, 2))
    least = error.flatten(0, 1).amin(0)
    torch.testing.assert_close((weight * (x - state_values()[found]).square()).sum(0), least)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("outputs", [16, 300])
def test_states_follow_from_the_codes_alone(bits: int, outputs: int) -> None:
    states, _ = trellis_nearest(random(outputs, 12), bits)
    assert states.dtype == torch.int16
    assert torch.equal(states_of(states & ((1 << bits) - 1), bits), states)


def test_sequences_are_few_and_alike() -> None:
    assert sequences(16) == [16]
    assert sequences(256) == [256]
    assert sequences(257) == [129, 128]
    assert sequences(1536) == [256] * 6


@pytest.mark.parametrize(("bits", "most"), [(2, 0.082), (3, 0.024), (4, 0.0075)])
def test_error_is_below_that_of_the_best_fixed_values(bits: int, most: float) -> None:
    """A normal distribution; the best 4, 8, 16 fixed values leave 0.118, 0.0345, 0.0095 of its variance (Max, 1960)."""
    weight = random(256, 24)
    states, scale = trellis_nearest(weight, bits)
    error = weight - rotate(values_of(states) * scale, back=True)
    assert error.square().mean() < most


def test_gptq_of_uncorrelated_inputs_rounds_to_nearest() -> None:
    weight = random(40, 24)
    states, _ = trellis_gptq(weight, torch.eye(24), torch.arange(24).flip(0), 2)
    expected = TrellisCoder(2, weight.device).columns(weight.t().contiguous(), weight.square().mean(1).sqrt()).t()
    assert torch.equal(states, expected)


def test_gptq_lowers_the_output_error() -> None:
    inputs = random(400, 64) @ random(64, 64, seed=1)
    weight, hessian = random(64, 64, seed=2), inputs.T @ inputs
    turned = rotate(rotate(hessian).t()).contiguous()
    order, factor, _ = act_order_factor(turned)
    states, scale = trellis_gptq(rotate(weight), factor.float(), order, 2)

    def error(states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        difference = weight - rotate(values_of(states) * scale, back=True)
        return (difference @ hessian * difference).sum()

    assert error(states, scale) < 0.7 * error(*trellis_nearest(weight, 2))


@pytest.mark.parametrize("inputs", [1, 6, 64, 96])
def test_rotation_is_orthogonal(inputs: int) -> None:
    rotation = rotate(torch.eye(inputs))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(inputs))
    weight = random(3, inputs)
    torch.testing.assert_close(rotate(weight), weight @ rotation)
    torch.testing.assert_close(rotate(rotate(weight), back=True), weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_likely_error_is_as_large_as_that_of_codes(bits: int) -> None:
    """Its size, and how far it shrinks the weights."""
    weights = random(192, 256, seed=1)
    states, scale = trellis_nearest(weights, bits)
    of_codes, likely = rotate(values_of(states) * scale, back=True) - weights, likely_error(weights, bits)
    for measure in (torch.Tensor.square, lambda error: -error * weights):
        assert float(measure(likely).sum()) == pytest.approx(float(measure(of_codes).sum()), rel=0.2)
