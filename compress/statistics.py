"""Intervals: by bootstrap over documents (Efron 1979; Koehn 2004 for paired comparison of language systems), and exact ones
for counts of labelled examples (`share`, `accuracy_drop`).

The bootstrap draws documents with replacement, the same ones for both models, and computes the metric of each draw.
``lower`` and ``upper`` are one-sided percentile bounds, each at the given confidence. The claim "the increase is at most δ"
holds with that confidence if ``upper`` ≤ δ, and is refuted with it if ``lower`` > δ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import ReportError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: A bootstrap of fewer units is not informative.
FEWEST_UNITS = 10
#: In `accuracy_drop`: share of the error probability spent on the rate of discordant texts, and number of rates tried.
_FOR_THE_RATE, _RATES = 0.02, 15


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its one-sided bounds; ``units`` documents, chunks or rounds were resampled."""

    value: float
    lower: float
    upper: float
    units: int

    @property
    def finite(self) -> bool:
        """Whether value and bounds are neither NaN nor infinite."""
        return all(math.isfinite(x) for x in (self.value, self.lower, self.upper))


def accuracy_drop(lost: int, won: int, texts: int, confidence: float) -> Interval:
    """Drop of accuracy in points, with exact bounds: each misses the true drop in at most 1 - confidence of all samples.

    A share r of all texts is discordant, and a share p of these turned from right to wrong, so the drop is r (2p - 1). The
    number n of discordant texts is binomial (texts, r), and ``lost`` is binomial (n, p), as in McNemar's exact test
    (Psychometrika 12, 1947). A drop is beyond the bound if data at least this extreme are too rare for every r. The score
    statistic of Tango (Statistics in Medicine 17, 1998) orders the data. r runs over its own exact bounds, which use a fiftieth
    of the error probability (Berger and Boos, JASA 89, 1994). Bounds of p alone, given n, would miss too often: for a model
    that only loses texts both would equal the observed drop.

    Args:
        lost: number of texts that the original classifies correctly and the candidate does not. won: the reverse.
    """
    upper, lower = (_drop_bound(b, c, texts, 1 - confidence) for b, c in ((lost, won), (won, lost)))
    return Interval(100 * (lost - won) / texts, -100 * lower, 100 * upper, texts)


def _drop_bound(lost: int, won: int, texts: int, missed: float) -> float:
    """Largest drop, as a share, that the data do not refute at error probability ``missed``; accurate to 1e-6."""
    import numpy as np

    beside = missed * _FOR_THE_RATE
    rate = share(lost + won, texts, 1 - beside / 2)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, texts + 1)))])  # of factorials
    n = _likely((texts, texts), (rate.lower, rate.upper))
    ways_n = logs[texts] - logs[n] - logs[texts - n]

    def refuted(drop: float) -> bool:
        if abs(drop) > rate.upper:
            return True
        rates = np.linspace(max(rate.lower, abs(drop)), rate.upper, _RATES)
        shares = np.clip((rates + drop) / (2 * rates), 1e-12, 1 - 1e-12)
        rates = np.clip(rates, 1e-12, 1 - 1e-12)
        b = _likely((int(n[0]), int(n[-1])), (shares.min(), shares.max()))
        possible = n[:, None] >= b
        c = np.where(possible, n[:, None] - b, 0)
        beyond = possible & (_score(b, c, texts, drop) <= _score(lost, won, texts, drop) + 1e-9)
        ways = logs[n][:, None] - logs[b] - logs[c]
        for r, p in zip(rates, shares, strict=True):
            terms = (ways_n + n * math.log(r) + (texts - n) * math.log1p(-r))[:, None]
            terms = terms + ways + b * math.log(p) + c * math.log1p(-p)
            if float(np.exp(terms[beyond]).sum()) > missed - beside:
                return False
        return True

    low, high = (lost - won) / texts, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return high


def _likely(of: tuple[int, int], share: tuple[float, float]) -> NDArray[np.int64]:
    """Range of binomial counts that holds all but 1e-9 of the probability. ``of``, ``share``: least and most of each."""
    import numpy as np

    low, high = (x * n for x, n in zip(share, of, strict=True))
    spread = [6.5 * math.sqrt(n) / 2 + 10 for n in of]
    return np.arange(max(0, int(low - spread[0])), min(of[1], int(high + spread[1])) + 1)


def _score(lost: Any, won: Any, texts: int, drop: float) -> Any:
    """Tango's statistic: standard deviations of the data above a drop, at the likeliest discordant rate for that drop."""
    import numpy as np

    a, c = 2 * texts, -won * drop * (1 - drop)
    b = -lost - won + (2 * texts - lost + won) * drop
    rate = (np.sqrt(np.maximum(b * b - 4 * a * c, 0)) - b) / (2 * a)
    spread = np.sqrt(np.maximum(texts * (2 * rate + drop * (1 - drop)), 1e-12))
    return (lost - won - texts * drop) / spread


def share(count: int, of: int, confidence: float) -> Interval:
    """Share ``count / of`` with the exact one-sided bounds of Clopper and Pearson (Biometrika 26, 1934).

    The lower bound is the p at which ``count`` or more hits have probability 1 - confidence; it is 0 without hits. The upper
    bound is defined likewise.
    """
    lower = 0.0 if count == 0 else _solve(lambda p: _upper_tail(count, of, p), 1 - confidence)
    upper = 1.0 if count == of else 1 - _solve(lambda q: _upper_tail(of - count, of, q), 1 - confidence)
    return Interval(count / of, lower, upper, of)


def _upper_tail(count: int, of: int, p: float) -> float:
    """P(X ≥ count) of X binomial (of, p), 0 < p < 1."""
    import numpy as np

    k = np.arange(of + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, of + 1)))])  # of factorials
    terms = logs[of] - logs - logs[::-1] + k * math.log(p) + (of - k) * math.log1p(-p)
    return float(np.exp(terms[count:]).sum())


def _solve(rising: Callable[[float], float], value: float) -> float:
    """The p in (0, 1) at which a rising function has the value, by bisection to the last bit."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return low


def median_ratio(
    before: Sequence[float], after: Sequence[float], *, confidence: float, bootstrap: int, seed: int
) -> Interval:
    """Median of ``after`` over median of ``before``. Both are resampled by the same rounds, in which they were measured.

    Raises:
        ReportError: the numbers of rounds differ, or there are none.
    """
    import numpy as np

    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if len(first) != len(second) or not len(first):
        raise ReportError("the two models were not timed in the same rounds")
    picks = np.random.default_rng(seed).integers(len(first), size=(bootstrap, len(first)))
    ratios = np.median(second[picks], axis=1) / np.median(first[picks], axis=1)
    lower, upper = np.quantile(ratios, [1 - confidence, confidence])
    return Interval(float(np.median(second) / np.median(first)), float(lower), float(upper), len(first))


def quantile(samples: Sequence[float], share: float) -> float:
    """Quantile with linear interpolation, as numpy's default."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def resample(
    statistic: Callable[[Any], Any],
    columns: Sequence[NDArray[np.float64]],
    confidence: float,
    bootstrap: int,
    seed: int,
) -> Interval:
    """Bootstrap interval of a statistic of the columns' sums, [columns] or [columns, draws]; NaN if a value is not finite."""
    import numpy as np

    table = np.stack(columns)  # [parts, units]
    if not np.isfinite(table).all():
        return Interval(math.nan, math.nan, math.nan, table.shape[1])
    return bootstrap_statistic(lambda counts: statistic(table @ counts), table.shape[1], confidence, bootstrap, seed)


def bootstrap_statistic(
    statistic: Callable[[NDArray[np.float64]], Any], units: int, confidence: float, bootstrap: int, seed: int
) -> Interval:
    """Bootstrap interval of a statistic of the draws: it maps counts of each unit, [units, draws], to values [draws]."""
    import numpy as np

    value = float(statistic(np.ones((units, 1)))[0])
    generator = np.random.default_rng(seed)
    draws, step = [], max(1, 4_000_000 // units)
    for start in range(0, bootstrap, step):
        counts = generator.multinomial(units, np.full(units, 1 / units), size=min(step, bootstrap - start))
        draws.append(statistic(counts.T.astype(np.float64)))
    lower, upper = np.quantile(np.concatenate(draws), [1 - confidence, confidence])
    return Interval(value, float(lower), float(upper), units)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; ties get mean ranks. 0 if a side is constant, NaN if a value is not finite."""
    import numpy as np

    return float(correlation(np.array(first), np.array(second))(np.ones((len(first), 1)))[0])


def correlation(
    first: NDArray[np.float64], second: NDArray[np.float64]
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Spearman's correlation as a function of how often each pair is drawn, [pairs, draws] ▶ [draws]."""
    import numpy as np

    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return lambda counts: np.full(counts.shape[1], math.nan)
    ranks = [_mean_ranks(values) for values in (first, second)]

    def correlation(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        middle = (counts.sum(0) + 1) / 2
        x, y = (rank(counts) - middle for rank in ranks)
        spread = (counts * x * x).sum(0) * (counts * y * y).sum(0)
        result: NDArray[np.float64] = (counts * x * y).sum(0) / np.sqrt(np.where(spread > 0, spread, 1))
        return result

    return correlation


def _mean_ranks(values: NDArray[np.float64]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Ranks of values from 1, as a function of how often each is drawn. Equal values get the mean of their ranks."""
    import numpy as np

    order = np.argsort(values, kind="stable")
    _, starts, group = np.unique(values[order], return_index=True, return_inverse=True)

    def ranks(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        together = np.add.reduceat(counts[order], starts, axis=0)
        result = np.empty_like(counts)
        result[order] = (together.cumsum(0) - (together - 1) / 2)[group]
        return result

    return ranks


def documents_needed(interval: Interval, bound: float) -> int | None:
    """Approximate number of documents that would decide, as the interval shrinks with the root of their number.

    None if the value is on the bound, or so close that over ten million would be needed.
    """
    distance = abs(bound - interval.value)
    half = interval.upper - interval.value if interval.value <= bound else interval.value - interval.lower
    if distance == 0 or half <= 0:
        return None
    needed = interval.units * (half / distance) ** 2
    return max(FEWEST_UNITS, math.ceil(round(needed, 6))) if needed < 1e7 else None
