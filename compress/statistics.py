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
#: Metrics of labelled texts alone; their divergence and agreement are per text.
LABELLED = ("accuracy", "f1")


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
    """How many points the accuracy or F1 of labelled texts falls from ``before`` to ``after``, paired.

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
    columns = [column for side in rows for column in _label_counts(side, len(before["labels"]))]
    half = len(columns) // 2
    return _resample(lambda s: 100 * (_f1_of(s[:half]) - _f1_of(s[half:])), columns, confidence, bootstrap, seed)


def accuracy_drop(lost: int, won: int, texts: int, confidence: float) -> Interval:
    """The drop of accuracy in points, with exact bounds given the number of discordant texts.

    Of n = lost + won discordant texts a share p turned from right to wrong, so that the drop is n (2p - 1) / texts. Given
    n, ``lost`` is binomial (n, p), as in McNemar's exact test (McNemar 1947; Agresti, Categorical Data Analysis, 3rd ed.,
    section 11.1), and p has Clopper and Pearson's bounds. So nothing is approximated, but n / texts is taken as it was
    found: how many discordant texts another sample would have is not in the interval, and with n = 0 it is a point.

    Args:
        lost: texts that the original had right and the candidate has wrong. won: the reverse.
    """
    n = lost + won
    if n == 0:
        return Interval(0.0, 0.0, 0.0, texts)
    p = share(lost, n, confidence)
    value, lower, upper = (100 * n * (2 * x - 1) / texts for x in (p.value, p.lower, p.upper))
    return Interval(value, lower, upper, texts)


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
    for key in ("unit", "window", "stride", "labels"):
        if before.get(key) != after.get(key):
            raise ReportError(f"the two evaluations differ in {key}: {before.get(key)} and {after.get(key)}")
    same = "label" if before["unit"] == "example" else "bytes"
    names = [[(d["id"], d[same]) for d in e["documents"]] for e in (before, after)]
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
    import numpy as np

    table = np.stack(columns)  # [parts, units]
    units = table.shape[1]
    value = float(statistic(table.sum(1)))
    if not np.isfinite(table).all():
        return Interval(math.nan, math.nan, math.nan, units)
    generator = np.random.default_rng(seed)
    draws, step = [], max(1, 4_000_000 // units)
    for start in range(0, bootstrap, step):
        counts = generator.multinomial(units, np.full(units, 1 / units), size=min(step, bootstrap - start))
        draws.append(statistic(table @ counts.T.astype(np.float64)))
    lower, upper = np.quantile(np.concatenate(draws), [1 - confidence, confidence])
    return Interval(value, float(lower), float(upper), units)


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
    """Relative increase of bits per byte and perplexity, or drop of accuracy and F1 in points, with bounds.

    With them the levels of divergence and agreement, where they were measured.
    """
    how: dict[str, Any] = {"confidence": confidence, "bootstrap": bootstrap, "seed": seed}
    result: dict[str, Any] = dict(how) | {"unit": after["unit"], "units": len(after["documents"])}
    result |= _changes(before, after, how)
    for name in ("kl", "agreement"):
        if after[name] is not None:
            found = level(after, name, **how)
            result[name] = {"value": found.value, "lower": found.lower, "upper": found.upper}
    return result


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], how: Mapping[str, Any]) -> dict[str, Any]:
    if after["unit"] == "example":
        drops = {name: drop(before, after, name, **how) for name in LABELLED}
        return {n: {"drop": found.value, "lower": found.lower, "upper": found.upper} for n, found in drops.items()}
    result = {}
    same = [d["tokens"] for d in before["documents"]] == [d["tokens"] for d in after["documents"]]
    for name in ("bits_per_byte", "perplexity") if same else ("bits_per_byte",):
        found = increase(before, after, name, relative=True, **how)
        result[name] = {"increase": found.value, "lower": found.lower, "upper": found.upper}
    return result
