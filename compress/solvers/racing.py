"""Racing: which candidates are worse than the leader, by what all of them lose on the same few samples.

Losses of candidates differ by orders of magnitude, and they rise and fall with the sample. So their logarithms are compared
sample by sample. Few samples tell a variance badly: the variances of all candidates are shrunk towards a common one, as in the
moderated t-test of Smyth (Statistical Applications in Genetics and Molecular Biology 3, 2004). Racing: Maron and Moore
(Artificial Intelligence Review 11, 1997); Birattari et al. (GECCO 2002).
"""

from __future__ import annotations

import math

import torch

#: Smallest loss, for logarithms. Smallest variance of a logarithm of a ratio of losses.
_LEAST, _LEAST_VARIANCE = 1e-12, 1e-8
#: Standard normal value from which on a variance counts as an outlier, 1 in 100.
_OUTLIER = 2.326
#: Degrees of freedom from which on Student's t counts as normal.
_NORMAL = 1000.0


def behind(losses: torch.Tensor, leader: torch.Tensor, error: float) -> torch.Tensor:
    """Which candidates lose more than the leader: each wrongly so with a probability of at most ``error`` / candidates.

    Args:
        losses: by candidate and sample, [candidates, samples], 0 or more; infinite for a candidate that fails.
        leader: of the leader, on the same samples. error: 0 for no decision.

    Returns:
        bool [candidates]. Of one sample none is behind, but those that fail.
    """
    fails = ~torch.isfinite(losses).all(1)
    worse = fails & bool(torch.isfinite(leader).all())
    samples, racing = losses.shape[1], int((~fails).sum())
    if samples < 2 or error <= 0 or not racing or not torch.isfinite(leader).all():
        return worse if error > 0 else torch.zeros_like(worse)
    ratios = (losses[~fails].clamp(min=_LEAST).log() - leader.clamp(min=_LEAST).log()).double()
    variances, freedom = _without_outliers(ratios.var(1), samples - 1)
    scores = ratios.mean(1) / (variances / samples).sqrt()
    level = error / len(losses)
    worse[~fails] = torch.tensor([upper_tail(float(score), freedom) < level for score in scores])
    return worse


def expected_gain(losses: torch.Tensor, leader: torch.Tensor) -> torch.Tensor:
    """Expected fall of the logarithm of the leader's loss by a candidate, where that is better, else 0; float64 [candidates].

    E max(0, -r) where the mean r of the logarithms of the ratios of losses has Student's t distribution around what was
    measured: the expected improvement of Bayesian optimisation, in its form for t (Tracey and Wolpert, arXiv 1801.06147).

    Args:
        losses: finite, by candidate and sample, [candidates, samples], of two samples or more. leader: on the same samples.
    """
    samples = losses.shape[1]
    ratios = (losses.clamp(min=_LEAST).log() - leader.clamp(min=_LEAST).log()).double()
    variances, freedom = _without_outliers(ratios.var(1), samples - 1)
    errors = (variances / samples).sqrt()
    scores = ratios.mean(1) / errors
    gains = []
    for score, error in zip(scores.tolist(), errors.tolist(), strict=True):
        if freedom > _NORMAL:
            density, spread = math.exp(-score * score / 2) / math.sqrt(2 * math.pi), 1.0
        else:
            log_density = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
            density = math.exp(log_density - (freedom + 1) / 2 * math.log1p(score * score / freedom))
            spread = (freedom + score * score) / max(freedom - 1, 1e-9)
        gains.append(error * (spread * density - score * upper_tail(score, freedom)))
    return torch.tensor(gains, dtype=torch.float64)


def moderated(variances: torch.Tensor, freedom: int) -> tuple[torch.Tensor, float]:
    """Variances shrunk towards a common one, and their degrees of freedom; Smyth 2004, sections 5 and 6.

    True variances are taken to be s² d / χ²(d), and s and d are those that give the logarithms of the variances their mean and
    variance.

    Args:
        variances: [candidates], each of ``freedom`` degrees of freedom.
    """
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    logs = variances.double().clamp(min=_LEAST_VARIANCE).log() - torch.digamma(half) + half.log()
    if len(logs) < 3:
        return variances.double().clamp(min=_LEAST_VARIANCE), freedom
    beyond = float(logs.var() - torch.polygamma(1, half))
    if beyond <= 0:
        return logs.mean().exp().expand_as(logs), math.inf
    prior = 2 * _inverse_trigamma(beyond)
    common = (logs.mean() + torch.digamma(torch.tensor(prior / 2)) - math.log(prior / 2)).exp()
    shrunk = (prior * common + freedom * variances.double()) / (prior + freedom)
    return shrunk.clamp(min=_LEAST_VARIANCE), prior + freedom


def _without_outliers(variances: torch.Tensor, freedom: int) -> tuple[torch.Tensor, float]:
    """The same, but for variances that are above the shrunk ones by more than chance explains, which stay as they are.

    One sample with an unusual loss makes such a variance; Phipson et al. (Annals of Applied Statistics 10, 2016).
    """
    shrunk, beside = moderated(variances, freedom)
    spread = 2 / (9 * freedom)  # Wilson and Hilferty's cube root of χ² / freedom
    bound = (1 - spread + _OUTLIER * math.sqrt(spread)) ** 3
    return torch.where(variances > bound * shrunk, variances.double(), shrunk), beside


def _inverse_trigamma(value: float) -> float:
    """The x > 0 whose trigamma function is ``value``, by bisection of its logarithm."""
    low, high = -20.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        x = torch.tensor(math.exp(middle), dtype=torch.float64)
        low, high = (middle, high) if float(torch.polygamma(1, x)) > value else (low, middle)
    return math.exp(low)


def upper_tail(score: float, freedom: float) -> float:
    """P(T > score) of Student's t, accurate to 1e-7; normal from `_NORMAL` degrees of freedom on.

    By Simpson's rule on the angle θ with T = √freedom tan θ.
    """
    if freedom > _NORMAL:
        return math.erfc(score / math.sqrt(2)) / 2
    angle = math.atan(score / math.sqrt(freedom))
    angles = torch.linspace(angle, math.pi / 2, 4097, dtype=torch.float64)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    heights = angles.cos().clamp(min=0).pow(freedom - 1) * math.exp(log_scale)
    weights = torch.ones(4097, dtype=torch.float64)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float((heights * weights).sum() * (math.pi / 2 - angle) / 4096 / 3)
