"""Intervals by bootstrap over documents (Efron 1979; Koehn 2004 for paired comparison of language systems).

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
    for key in ("unit", "window", "stride"):
        if before[key] != after[key]:
            raise ReportError(f"the two evaluations differ in {key}: {before[key]} and {after[key]}")
    names = [[(d["id"], d["bytes"]) for d in e["documents"]] for e in (before, after)]
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
    """Relative increase of bits per byte and perplexity, and the levels of divergence and agreement, with bounds."""
    how: dict[str, Any] = {"confidence": confidence, "bootstrap": bootstrap, "seed": seed}
    result: dict[str, Any] = dict(how) | {"unit": after["unit"], "units": len(after["documents"])}
    same = [d["tokens"] for d in before["documents"]] == [d["tokens"] for d in after["documents"]]
    for name in ("bits_per_byte", "perplexity") if same else ("bits_per_byte",):
        found = increase(before, after, name, relative=True, **how)
        result[name] = {"increase": found.value, "lower": found.lower, "upper": found.upper}
    for name in ("kl", "agreement"):
        if after[name] is not None:
            found = level(after, name, **how)
            result[name] = {"value": found.value, "lower": found.lower, "upper": found.upper}
    return result
