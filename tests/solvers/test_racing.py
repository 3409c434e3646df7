"""Racing against scipy's distributions, and against races whose best candidate is known."""

from __future__ import annotations

import math

import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch

from compress.solvers.racing import behind, expected_gain, moderated, upper_tail


@pytest.mark.parametrize("freedom", [1, 2.5, 7, 40, math.inf])
def test_upper_tail_matches_scipy(freedom):
    for score in (-3.0, 0.0, 0.7, 3.0, 9.0):
        expected = scipy.stats.norm.sf(score) if math.isinf(freedom) else scipy.stats.t.sf(score, freedom)
        assert upper_tail(score, freedom) == pytest.approx(expected, abs=1e-7)


def test_expected_gain_is_the_mean_of_what_is_better():
    """Of one candidate and a leader, E max(0, -r) with r of Student's t distribution around the measured mean."""
    generator = torch.Generator().manual_seed(4)
    leader = torch.rand(7, generator=generator).double() + 0.5
    for shift in (-0.4, 0.05, 0.6):
        losses = leader * torch.exp(shift + 0.2 * torch.randn(1, 7, generator=generator).double())
        ratios = (losses / leader).log()[0]
        spread = scipy.stats.t(6, float(ratios.mean()), float(ratios.std() / math.sqrt(7)))
        expected = -spread.expect(lb=-50, ub=0)
        assert float(expected_gain(losses, leader)) == pytest.approx(expected, rel=1e-4)


def test_moderated_variances_match_their_definition():
    """The prior's degrees of freedom and variance solve Smyth's equations for the mean and variance of the logarithms."""
    generator = torch.Generator().manual_seed(0)
    variances = torch.rand(40, generator=generator).double() * torch.logspace(-1, 1, 40).double()
    freedom = 5
    logs = variances.log().numpy()
    spread = logs.var(ddof=1) - scipy.special.polygamma(1, freedom / 2)
    half = scipy.optimize.brentq(lambda x: scipy.special.polygamma(1, x) - spread, 1e-3, 1e3)
    mean = logs.mean() - scipy.special.digamma(freedom / 2) + scipy.special.digamma(half) + math.log(freedom / 2 / half)
    expected = (2 * half * math.exp(mean) + freedom * variances) / (2 * half + freedom)
    shrunk, total = moderated(variances, freedom)
    assert total == pytest.approx(2 * half + freedom, rel=1e-6)
    torch.testing.assert_close(shrunk, expected, rtol=1e-6, atol=0)
    alike, endless = moderated(torch.full((9,), 0.3), 5)
    assert math.isinf(endless)
    assert len(set(alike.tolist())) == 1


def races(best: float, count: int, samples: int) -> torch.Tensor:
    """Losses of 300 races, [race, candidate, sample]: the first candidate's are the least, by the factor ``best``."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(300, 1, samples, generator=generator)
    spread = 0.1 + 0.2 * torch.rand(300, count, 1, generator=generator)
    losses = torch.exp(text * 0.4 + spread * torch.randn(300, count, samples, generator=generator))
    losses[:, 0] *= best
    return losses.double()


def leaves(losses: torch.Tensor, error: float) -> list[list[bool]]:
    """Who leaves each race after its last sample."""
    return [behind(race, race[int(race.mean(1).argmin())], error).tolist() for race in losses]


@pytest.mark.slow
def test_the_best_candidate_rarely_leaves():
    """It is 2 % better than 19 others that are alike, so that another one leads nearly always."""
    gone = leaves(races(0.98, 20, 6), 0.05)
    assert sum(race[0] for race in gone) <= 0.05 * len(gone)


def test_much_worse_candidates_leave_after_few_samples():
    gone = leaves(races(0.2, 20, 4)[:100], 0.05)
    assert sum(race[0] for race in gone) == 0
    assert sum(map(sum, gone)) > 0.9 * 19 * len(gone)


def test_a_candidate_that_fails_leaves_at_once():
    losses = torch.tensor([[1.0], [math.inf], [1.1]])
    assert behind(losses, losses[0], 0.05).tolist() == [False, True, False]
    assert behind(losses, losses[0], 0).tolist() == [False, False, False]


def test_an_unusual_sample_of_the_best_candidate_does_not_drop_it():
    """It loses less than the leader on each sample but one, where it loses twenty times as much; all others are alike."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(100, 60, 2, generator=generator).double() * 0.1
    noise[:, -1] -= 0.05
    noise[:, -1, 0] += math.log(20)
    leader = torch.ones(2, dtype=torch.float64)
    assert not any(behind(race.exp(), leader, 0.01)[-1] for race in noise)
