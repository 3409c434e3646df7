"""Intervals: by bootstrap over documents (Efron 1979; Koehn 2004 for paired comparison of language systems), and exact ones
for counts of labelled texts (`share`, `accuracy_drop`).

Documents are drawn with replacement, the same ones for both models, and a metric is computed of the sums of each draw.
``lower`` and ``upper`` are one-sided percentile bounds, each at the given confidence: a claim "the increase is at most δ"
holds with that confidence when ``upper`` ≤ δ, and is refuted with it when ``lower`` > δ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import ReportError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Sums = Mapping[str, "NDArray[np.float64]"]

#: With fewer units a bootstrap says nothing.
FEWEST_UNITS = 10
#: What a metric sums up: numerator and denominator.
PARTS = {"bits_per_byte": ("nll", "bytes"), "perplexity": ("nll", "tokens"), "kl": ("kl", "tokens")}
PARTS["agreement"] = ("agree", "tokens")
PARTS["similarity"] = ("similarity", "tokens")
#: Metrics of which two models each have one of their own, and more is better: a drop is from one to the other.
SCORES = ("accuracy", "f1", "spearman")
#: Of `accuracy_drop`: the part of what may be missed that goes to the rate of discordant texts, and how many rates are tried.
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
        """Neither NaN nor infinite anywhere."""
        return all(math.isfinite(x) for x in (self.value, self.lower, self.upper))


def _metric(name: str, numerator: Any, denominator: Any) -> Any:
    import numpy as np

    value = numerator / denominator
    if name == "bits_per_byte":
        return value / math.log(2)
    with np.errstate(over="ignore"):
        return np.exp(value) if name == "perplexity" else value


def level(evaluation: Mapping[str, Any], name: str, *, confidence: float, bootstrap: int, seed: int) -> Interval:
    """The metric ``name`` of one evaluation."""
    rows = evaluation["documents"]
    if evaluation["unit"] == "example":
        if name == "f1":
            return _resample(_f1_of, _label_counts(rows, len(evaluation["labels"])), confidence, bootstrap, seed)
        if name == "spearman":
            return _bootstrap(_correlation(*_columns(evaluation, _PAIRS)), len(rows), confidence, bootstrap, seed)
        if name == "accuracy":
            return share(sum(row["prediction"] == row["label"] for row in rows), len(rows), confidence)
        (column,) = _columns(evaluation, PARTS[name][:1])
        if name == "agreement":
            return share(int(column.sum()), len(rows), confidence)
        return _resample(lambda s: s[0] / len(rows), [column], confidence, bootstrap, seed)
    columns = _columns(evaluation, PARTS[name])
    return _resample(lambda s: _metric(name, s[0], s[1]), columns, confidence, bootstrap, seed)


def increase(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    name: str,
    *,
    relative: bool,
    confidence: float,
    bootstrap: int,
    seed: int,
) -> Interval:
    """How much the metric rises from ``before`` to ``after``, paired: absolute, or as a share of ``before``.

    Raises:
        ReportError: they were not measured on the same documents in the same way.
    """
    check_paired(before, after, tokens=PARTS[name][1] == "tokens")
    columns = _columns(before, PARTS[name]) + _columns(after, PARTS[name])

    def change(sums: Any) -> Any:
        first, second = _metric(name, sums[0], sums[1]), _metric(name, sums[2], sums[3])
        return second / first - 1 if relative else second - first

    return _resample(change, columns, confidence, bootstrap, seed)


def drop(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    name: str,
    *,
    confidence: float,
    bootstrap: int,
    seed: int,
) -> Interval:
    """How many points accuracy, F1 or rank correlation (of 100) falls from ``before`` to ``after``, paired.

    Raises:
        ReportError: they were not measured on the same texts.
    """
    check_paired(before, after, tokens=False)
    rows = [evaluation["documents"] for evaluation in (before, after)]
    if name == "accuracy":
        right = [[row["prediction"] == row["label"] for row in side] for side in rows]
        lost = sum(a and not b for a, b in zip(*right, strict=True))
        won = sum(b and not a for a, b in zip(*right, strict=True))
        return accuracy_drop(lost, won, len(rows[0]), confidence)
    if name == "spearman":
        first, second = (_correlation(*_columns(evaluation, _PAIRS)) for evaluation in (before, after))

        def change(counts: Any) -> Any:
            return 100 * (first(counts) - second(counts))

        return _bootstrap(change, len(rows[0]), confidence, bootstrap, seed)
    columns = [column for side in rows for column in _label_counts(side, len(before["labels"]))]
    half = len(columns) // 2
    return _resample(lambda s: 100 * (_f1_of(s[:half]) - _f1_of(s[half:])), columns, confidence, bootstrap, seed)


def accuracy_drop(lost: int, won: int, texts: int, confidence: float) -> Interval:
    """The drop of accuracy in points, with exact bounds: each misses the true drop at most in 1 - confidence of all samples.

    A share r of all texts is discordant, and of these a share p turned from right to wrong: the drop is r (2p - 1). The number
    n of discordant texts is binomial (texts, r) and ``lost`` of them binomial (n, p), as in McNemar's exact test (Psychometrika
    12, 1947). A drop is beyond the bound if data so far on this side of it are too rare whatever r is: data are ordered by the
    score statistic of Tango (Statistics in Medicine 17, 1998), and r runs over its own exact bounds, which take a fiftieth of
    what may be missed (Berger and Boos, JASA 89, 1994). Bounds of p alone, with n taken as known, would miss too often: of a
    model that only loses texts they say that the drop is what was found.

    Args:
        lost: texts that the original had right and the candidate has wrong. won: the reverse.
    """
    upper, lower = (_drop_bound(b, c, texts, 1 - confidence) for b, c in ((lost, won), (won, lost)))
    return Interval(100 * (lost - won) / texts, -100 * lower, 100 * upper, texts)


def _drop_bound(lost: int, won: int, texts: int, missed: float) -> float:
    """The largest drop, as a share, that the data do not refute, to a millionth."""
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
    """Counts of hits, but for the rarest (1e-9), in so many trials, from the least to the most, with shares from … to …."""
    import numpy as np

    low, high = (x * n for x, n in zip(share, of, strict=True))
    spread = [6.5 * math.sqrt(n) / 2 + 10 for n in of]
    return np.arange(max(0, int(low - spread[0])), min(of[1], int(high + spread[1])) + 1)


def _score(lost: Any, won: Any, texts: int, drop: float) -> Any:
    """Tango's statistic: how many standard deviations the data lie above a drop, at the likeliest rate that it allows."""
    import numpy as np

    a, c = 2 * texts, -won * drop * (1 - drop)
    b = -lost - won + (2 * texts - lost + won) * drop
    rate = (np.sqrt(np.maximum(b * b - 4 * a * c, 0)) - b) / (2 * a)
    spread = np.sqrt(np.maximum(texts * (2 * rate + drop * (1 - drop)), 1e-12))
    return (lost - won - texts * drop) / spread


def share(count: int, of: int, confidence: float) -> Interval:
    """A binomial share with the exact bounds of Clopper and Pearson (Biometrika 26, 1934), one-sided each.

    The lower bound is the p at which ``count`` or more has the probability 1 - confidence, 0 for none; the upper one likewise.
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


def macro_f1(rows: Sequence[Mapping[str, Any]], labels: int) -> float:
    """The mean of F1 = 2 TP / (2 TP + FP + FN) over the labels that some text has or is given."""
    return float(_f1_of([column.sum() for column in _label_counts(rows, labels)]))


def _label_counts(rows: Sequence[Mapping[str, Any]], labels: int) -> list[NDArray[np.float64]]:
    """For each label, which texts are its true positives; then for each, 2 TP + FP + FN of each text."""
    import numpy as np

    truth, said = (np.array([row[key] for row in rows]) for key in ("label", "prediction"))
    has = [(truth == label).astype(np.float64) for label in range(labels)]
    given = [(said == label).astype(np.float64) for label in range(labels)]
    return [a * b for a, b in zip(has, given, strict=True)] + [a + b for a, b in zip(has, given, strict=True)]


def _f1_of(sums: Any) -> Any:
    """Macro F1 of sums of `_label_counts`, [2 labels] or [2 labels, draws]."""
    import numpy as np

    sums = np.asarray(sums)
    half = len(sums) // 2
    hits, total = sums[:half], sums[half:]
    each = 2 * hits / np.maximum(total, 1)
    return each.sum(0) / np.maximum((total > 0).sum(0), 1)


def median_ratio(
    before: Sequence[float], after: Sequence[float], *, confidence: float, bootstrap: int, seed: int
) -> Interval:
    """Median of ``after`` over median of ``before``; rounds are resampled together, as they were measured together."""
    import numpy as np

    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if len(first) != len(second) or not len(first):
        raise ReportError("the two models were not timed in the same rounds")
    picks = np.random.default_rng(seed).integers(len(first), size=(bootstrap, len(first)))
    ratios = np.median(second[picks], axis=1) / np.median(first[picks], axis=1)
    lower, upper = np.quantile(ratios, [1 - confidence, confidence])
    return Interval(float(np.median(second) / np.median(first)), float(lower), float(upper), len(first))


def check_paired(before: Mapping[str, Any], after: Mapping[str, Any], *, tokens: bool) -> None:
    """Both evaluations are of the same documents, windows and, for metrics per token, tokens. Raises `ReportError`."""
    for key in ("unit", "window", "stride", "labels", "pooling"):
        if before.get(key) != after.get(key):
            raise ReportError(f"the two evaluations differ in {key}: {before.get(key)} and {after.get(key)}")
    same = ("id", "bytes", "label", "score")
    names = [[[d.get(key) for key in same] for d in e["documents"]] for e in (before, after)]
    if names[0] != names[1]:
        raise ReportError("the two evaluations are of different documents")
    if tokens and [d["tokens"] for d in before["documents"]] != [d["tokens"] for d in after["documents"]]:
        raise ReportError("the two models split the text into different tokens", fix="compare bits_per_byte")


def _columns(evaluation: Mapping[str, Any], parts: Sequence[str]) -> list[NDArray[np.float64]]:
    import numpy as np

    rows = evaluation["documents"]
    if any(row[part] is None for part in parts for row in rows):
        raise ReportError("the evaluation was made without a model to compare with")
    return [np.array([row[part] for row in rows], dtype=np.float64) for part in parts]


def _resample(
    statistic: Callable[[Any], Any],
    columns: Sequence[NDArray[np.float64]],
    confidence: float,
    bootstrap: int,
    seed: int,
) -> Interval:
    """Of a statistic of the columns' sums, [columns] or [columns, draws]."""
    import numpy as np

    table = np.stack(columns)  # [parts, units]
    if not np.isfinite(table).all():
        return Interval(math.nan, math.nan, math.nan, table.shape[1])
    return _bootstrap(lambda counts: statistic(table @ counts), table.shape[1], confidence, bootstrap, seed)


def _bootstrap(
    statistic: Callable[[NDArray[np.float64]], Any], units: int, confidence: float, bootstrap: int, seed: int
) -> Interval:
    """Of a statistic of how often each unit is drawn, [units, draws] ▶ [draws]."""
    import numpy as np

    value = float(statistic(np.ones((units, 1)))[0])
    generator = np.random.default_rng(seed)
    draws, step = [], max(1, 4_000_000 // units)
    for start in range(0, bootstrap, step):
        counts = generator.multinomial(units, np.full(units, 1 / units), size=min(step, bootstrap - start))
        draws.append(statistic(counts.T.astype(np.float64)))
    lower, upper = np.quantile(np.concatenate(draws), [1 - confidence, confidence])
    return Interval(value, float(lower), float(upper), units)


#: What rank correlation is of.
_PAIRS = ("cosine", "score")


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, ties by mean ranks; 0 where either is constant, NaN where anything is not finite."""
    import numpy as np

    return float(_correlation(np.array(first), np.array(second))(np.ones((len(first), 1)))[0])


def _correlation(
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
        found: NDArray[np.float64] = (counts * x * y).sum(0) / np.sqrt(np.where(spread > 0, spread, 1))
        return found

    return correlation


def _mean_ranks(values: NDArray[np.float64]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Ranks of values, from 1, as a function of how often each is drawn; equal ones share the mean of their ranks."""
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
    """About how many documents would decide: the interval shrinks with the root of their number.

    None where the value is on the bound, or so near that no test set would do (over ten million).
    """
    distance = abs(bound - interval.value)
    half = interval.upper - interval.value if interval.value <= bound else interval.value - interval.lower
    if distance == 0 or half <= 0:
        return None
    needed = interval.units * (half / distance) ** 2
    return max(FEWEST_UNITS, math.ceil(round(needed, 6))) if needed < 1e7 else None


def compare(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    confidence: float,
    bootstrap: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """What gates judge by, with bounds: relative increases, drops in points, and levels of what compares with the original."""
    how: dict[str, Any] = {"confidence": confidence, "bootstrap": bootstrap, "seed": seed}
    result: dict[str, Any] = dict(how) | {"unit": after["unit"], "units": len(after["documents"])}

    def measured(*names: str) -> list[str]:
        return [name for name in names if after.get(name) is not None]

    same = [d.get("tokens") for d in before["documents"]] == [d.get("tokens") for d in after["documents"]]
    for name in measured("bits_per_byte", *(("perplexity",) if same else ())):
        found = increase(before, after, name, relative=True, **how)
        result[name] = {"increase": found.value, "lower": found.lower, "upper": found.upper}
    for name in measured(*SCORES):
        found = drop(before, after, name, **how)
        result[name] = {"drop": found.value, "lower": found.lower, "upper": found.upper}
    for name in measured("kl", "agreement", "similarity"):
        found = level(after, name, **how)
        result[name] = {"value": found.value, "lower": found.lower, "upper": found.upper}
    return result
