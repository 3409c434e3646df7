"""Heads turned towards each other, beside what trying many turns finds."""

from __future__ import annotations

import math

import pytest
import torch

from compress.solvers.kv_merge import align_keys, align_values, merge

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(200, 10, generator=GENERATOR, dtype=torch.float64)
HESSIAN = INPUTS.T @ INPUTS


def heads(count: int = 2, width: int = 4) -> torch.Tensor:
    return torch.randn(count, width, 10, generator=GENERATOR, dtype=torch.float64)


def spread(weights: torch.Tensor) -> float:
    """Squared distance of the heads' outputs from their mean."""
    outputs = INPUTS @ weights.mT
    return float((outputs - outputs.mean(0)).square().sum())


def test_align_values_beats_random_rotations():
    weights = heads()
    turns = align_values(weights, HESSIAN)
    best = spread(turns @ weights)
    torch.testing.assert_close(turns @ turns.mT, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    assert best < spread(weights)
    for _ in range(200):
        other = torch.linalg.qr(torch.randn(2, 4, 4, generator=GENERATOR, dtype=torch.float64))[0]
        assert spread(other @ weights) >= best * (1 - 1e-9)


def test_align_keys_finds_best_angle():
    """Two heads of one pair each: of all angles between them the one that is found is best."""
    weights = heads(2, 2)
    found = spread(align_keys(weights, HESSIAN, 2) @ weights)
    tried = []
    for step in range(720):
        angle = torch.tensor(math.tau * step / 720, dtype=torch.float64)
        turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
        tried.append(spread(torch.stack([weights[0], turn @ weights[1]])))
    assert found == pytest.approx(min(tried), rel=1e-3)


@pytest.mark.parametrize("rotary", [2, 4, 6])
def test_align_keys_rotates_rotary_pairs_only(rotary):
    """A rotation by position commutes with the turn, and what lies beyond the pairs stays."""
    turns = align_keys(heads(3, 6), HESSIAN, rotary)
    half = rotary // 2
    position = torch.eye(6, dtype=torch.float64)
    for p in range(half):
        angle = torch.tensor(0.3 + p)
        position[p, p] = position[p + half, p + half] = angle.cos()
        position[p + half, p], position[p, p + half] = angle.sin(), -angle.sin()
    torch.testing.assert_close(turns @ position, position @ turns)
    torch.testing.assert_close(turns[:, rotary:, rotary:], torch.eye(6 - rotary, dtype=torch.float64).expand(3, -1, -1))


@pytest.mark.parametrize("align", [align_values, lambda w, h: align_keys(w, h, 4)])
def test_align_values_and_keys_leave_equal_heads(align):
    weights = heads(1).expand(3, -1, -1)
    torch.testing.assert_close(align(weights, HESSIAN) @ weights, weights)


def test_merge_averages_runs():
    weights = heads(4)
    expected = torch.stack([weights[:2].mean(0), weights[2:].mean(0)])
    torch.testing.assert_close(merge(weights, 2), expected.repeat_interleave(2, 0))
    torch.testing.assert_close(merge(weights[..., 0], 1), weights[..., 0].mean(0).expand(4, -1))
