"""The goals of a sweep: their values in a report, what a plan knows of them, and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from compress import statistics
from compress.evaluation import metrics
from compress.evaluation.metrics.base import Metric, Resampling
from compress.formatting import format_bytes, ratio
from compress.recipe.sweep import lower_is_better

if TYPE_CHECKING:
    from compress.planning import Plan

#: Value of a goal and the ends of its interval, the same three where it is exact.
Bounds = tuple[float, float, float]
_EXACT = {"size": "bytes", "parameters": "parameters"}
#: Metrics that a goal needs, by the goal; those of other goals have the goal's name.
_NEEDS = {"size": None, "parameters": None, "prefill": "latency", "decode": "latency", "memory": "memory"}


def needed_metrics(goals: Sequence[str]) -> list[str]:
    """The metrics that goals need, in their order."""
    named = [_NEEDS.get(goal, goal) for goal in goals]
    return list(dict.fromkeys(name for name in named if name is not None))


def measured(report: Mapping[str, Any], goals: Sequence[str]) -> dict[str, Bounds]:
    """Value and interval of each goal in a report. A goal that was not measured is NaN.

    Of a metric that does not compare with the original, the interval is that of the paired difference: it says what another
    text would change between the two models.
    """
    resolved = report["recipe"]["resolved"]
    resampling = Resampling(resolved["confidence"], resolved["bootstrap"], resolved["seed"])
    return {goal: _measured(report, goal, resampling) for goal in goals}


def _measured(report: Mapping[str, Any], goal: str, resampling: Resampling) -> Bounds:
    before, after = report["original"], report["result"]
    if goal in _EXACT:
        value = float(after["size"][_EXACT[goal]])
        return value, value, value
    if goal == "memory":
        peaks = [side["latency"]["memory"]["peak"] for side in (before, after)]
        value = peaks[1] / peaks[0]
        return value, value, value
    if goal in ("prefill", "decode"):
        samples = [side["latency"][goal]["samples"] for side in (before, after)]
        interval = statistics.median_ratio(*samples, **asdict(resampling))
        return interval.value, interval.lower, interval.upper
    if after["evaluation"] is None or after["evaluation"].get(goal) is None:
        return math.nan, math.nan, math.nan
    return _of_metric(metrics.table()[goal], before["evaluation"], after["evaluation"], resampling)


def _of_metric(metric: Metric, before: Mapping[str, Any], after: Mapping[str, Any], resampling: Resampling) -> Bounds:
    if metric.compares:
        level = metric.level(after, resampling)
        return level.value, level.lower, level.upper
    value, start = float(after[metric.name]), float(before[metric.name])
    if metric.lower:
        more = metric.increase(before, after, resampling, relative=False)
        return value, start + more.lower, start + more.upper
    drop = metric.drop(before, after, resampling)
    return value, start - drop.upper / 100, start - drop.lower / 100


def planned(plan: Plan, goals: Sequence[str]) -> dict[str, float]:
    """The best value that each goal can reach by a plan: bytes and parameters are exact, what is measured could be perfect."""
    last = plan.stages[-1].passes[-1]
    values = {}
    for goal in goals:
        if goal in _EXACT and last.spec.exact:
            values[goal] = float(getattr(last.size, _EXACT[goal]))
        else:
            values[goal] = 0.0 if lower_is_better(goal) else math.inf
    return values


def text(goal: str, value: float) -> str:
    """A value of a goal for people."""
    if not math.isfinite(value):
        return "–"
    if goal == "size":
        return format_bytes(value)
    if goal == "parameters":
        return f"{value:,.0f}"
    if goal in ("prefill", "decode", "memory"):
        return ratio(value)
    return metrics.table()[goal].text(value)


def title(goal: str) -> str:
    """The name of a goal in tables."""
    known = metrics.table().get(goal)
    return goal if known is None else known.title


def losses(values: Mapping[str, Bounds] | Mapping[str, float], goals: Sequence[str]) -> list[float]:
    """The values as numbers of which less is better, in the order of the goals; NaN counts as the worst."""
    row = []
    for goal in goals:
        given = values[goal]
        value = given[0] if isinstance(given, (tuple, list)) else given
        row.append(math.inf if math.isnan(value) else value if lower_is_better(goal) else -value)
    return row
