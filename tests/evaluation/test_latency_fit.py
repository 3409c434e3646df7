from __future__ import annotations

import itertools

import numpy as np
import pytest

from compress.evaluation.latency_fit import fit, half_length, nonnegative

LENGTHS = [512, 1024, 2048, 4096, 8192]


def curve(a, b, c, lengths=LENGTHS):
    return np.array([a + b * n + c * n * n for n in lengths])


def on_a_grid(lengths, seconds):
    """Slow twin: shrinking grids around the best non-negative terms, in units in which each term is at most 1."""
    n = np.array(lengths, float)
    rows = np.stack([np.ones_like(n), n / n.max(), (n / n.max()) ** 2], 1) / seconds[:, None]
    best, width = np.full(3, seconds.max() / 2), seconds.max() / 2
    for _ in range(60):
        axes = [np.clip(np.linspace(x - width, x + width, 9), 0, None) for x in best]
        grid = np.array(list(itertools.product(*axes)))
        best = grid[((grid @ rows.T - 1) ** 2).sum(1).argmin()]
        width *= 0.75
    return best / np.array([1, n.max(), n.max() ** 2])


@pytest.mark.parametrize("terms", [(0.01, 1e-5, 2e-9), (0, 1e-5, 0), (0.1, 0, 1e-9), (0.0, 0.0, 3e-9)])
def test_fit_finds_the_terms_of_a_curve(terms):
    np.testing.assert_allclose(nonnegative(LENGTHS, curve(*terms)), terms, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("seed", range(4))
def test_fit_is_the_best_of_a_grid(seed):
    random = np.random.default_rng(seed)
    seconds = curve(0.01, 1e-5, 2e-10) * random.uniform(0.7, 1.3, len(LENGTHS))
    twin, solved = on_a_grid(LENGTHS, seconds), nonnegative(LENGTHS, seconds)
    assert (solved >= 0).all()
    errors = [(((curve(*terms) / seconds) - 1) ** 2).sum() for terms in (solved, twin)]
    assert errors[0] <= errors[1] + 1e-9
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_fit_tells_the_length_where_attention_is_half():
    found = fit(LENGTHS, [[s] * 10 for s in curve(0, 1e-5, 2e-9)])
    assert found["half"] == pytest.approx(5000)
    assert (found["c_lower"], found["c_upper"], found["doubt"]) == (pytest.approx(2e-9), pytest.approx(2e-9), None)
    a, b, c = 0.3, 1e-5, 2e-9
    n = half_length(a, b, c)
    assert c * n * n == pytest.approx(a + b * n)
    assert half_length(1, 1, 0) is None


def test_fit_says_when_it_cannot_tell():
    assert fit([512, 1024], [[1.0], [2.0]]) == {
        **dict.fromkeys(("a", "b", "c", "c_lower", "c_upper", "half")),
        "doubt": "a fit takes 3 lengths or more, there are 2",
    }
    random = np.random.default_rng(1)
    noisy = fit(LENGTHS, [s * random.lognormal(0, 0.5, 10) for s in curve(0.001, 1e-5, 1e-11)])
    assert noisy["doubt"].startswith("the rounds do not tell n² from noise: c lies between")
    flat = fit(LENGTHS, [[s] * 5 for s in curve(0, 1e-5, 0)])
    assert (flat["c"], flat["half"]) == (0, None)
