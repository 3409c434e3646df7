"""Conjugate gradients for the projection of values, against the least-squares problem written out."""

from __future__ import annotations

import pytest
import torch

from compress.solvers.linformer import Attended, project_values, relative_error

RANK, POSITIONS, WIDTH, HEADS = 3, 8, 4, 2


def samples(count, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = []
    for number in range(count):
        tokens = POSITIONS - number % 3
        columns = torch.arange(tokens) * POSITIONS // tokens
        weights, values = draw(HEADS, tokens, RANK).softmax(-1), draw(HEADS, tokens, WIDTH)
        made.append(Attended(weights, values, draw(HEADS, tokens, WIDTH), columns, POSITIONS / tokens))
    return made


def slow(samples):
    """The projection of least error: one row of a dense system for each output number."""
    rows, targets = [], []
    for sample in samples:
        heads, tokens, width = sample.outputs.shape
        for h in range(heads):
            for t in range(tokens):
                for d in range(width):
                    row = torch.zeros(RANK, POSITIONS, dtype=torch.float64)
                    for r in range(RANK):
                        for u in range(tokens):
                            row[r, sample.columns[u]] += sample.scale * sample.weights[h, t, r] * sample.values[h, u, d]
                    rows.append(row.flatten())
                    targets.append(sample.outputs[h, t, d])
    return torch.linalg.lstsq(torch.stack(rows), torch.stack(targets)[:, None]).solution.view(RANK, POSITIONS)


def test_conjugate_gradients_reach_the_least_squares_solution():
    given = samples(4)
    start = torch.zeros(RANK, POSITIONS, dtype=torch.float64)
    fitted, errors = project_values(given, given, start, 200)
    expected = slow(given)
    assert errors[0] == pytest.approx(1)
    assert errors == sorted(errors, reverse=True) or errors[-1] == pytest.approx(min(errors), rel=1e-9)
    torch.testing.assert_close(fitted, expected, rtol=1e-5, atol=1e-7)
    assert relative_error(given, fitted) == pytest.approx(relative_error(given, expected))


def test_projection_is_the_best_on_held_out_samples():
    start = torch.zeros(RANK, POSITIONS, dtype=torch.float64)
    fitted, errors = project_values(samples(2), samples(3, seed=9), start, 30)
    assert relative_error(samples(3, seed=9), fitted) == pytest.approx(min(errors))
    assert min(errors) <= errors[0]
