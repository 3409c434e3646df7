"""The goals of a sweep: their values in a report, what a plan knows of them, and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from compress import statistics
from compress.errors import CompressError, ReportError
from compress.evaluation import metrics
from compress.evaluation.benchmarks import metric_of_task, task_change
from compress.evaluation.metrics.base import Metric, Resampling
from compress.formatting import fixed, format_bytes, ratio
from compress.recipe.sweep import OF_TASKS, Sweep, metric_of_goal, task_of_goal

if TYPE_CHECKING:
    from compress.planning import Plan

#: Value of a goal and the ends of its interval, the same three where it is exact.
Bounds = tuple[float, float, float]
_EXACT = {"size": "bytes", "parameters": "parameters"}


def needed_metrics(goals: Sequence[str]) -> list[str]:
    """The metrics that goals need, in their order."""
    named = [metric_of_goal(goal) for goal in goals]
    return list(dict.fromkeys(name for name in named if name is not None))


def measured(report: Mapping[str, Any], sweep: Sweep) -> dict[str, Bounds]:
    """Value and interval of each goal in a report. A goal that was not measured is NaN.

    Of a metric that does not compare with the original, the interval is that of the paired difference: it says what another
    text would change between the two models.

    Raises:
        CompressError: a goal names a task of lm-eval or a metric that was not measured, or its other direction.
    """
    resolved = report["recipe"]["resolved"]
    resampling = Resampling(resolved["confidence"], resolved["bootstrap"], resolved["seed"])
    return {
        goal: _of_task(report, goal, sweep, resampling)
        if goal.startswith(OF_TASKS)
        else _measured(report, goal, resampling)
        for goal in sweep.goals
    }


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


def _of_task(report: Mapping[str, Any], goal: str, sweep: Sweep, resampling: Resampling) -> Bounds:
    before, after = (report[side]["lm_eval"]["tasks"] for side in ("original", "result"))
    task, named = task_of_goal(goal, after)
    if task not in after:
        raise CompressError(
            f"lm-eval has measured {', '.join(after)}", where=f"the goal {goal}", fix="name one of them"
        )
    try:
        metric = metric_of_task(after[task], named, goal)
        change = task_change(before[task], after[task], metric, resampling)
    except ReportError as error:
        raise CompressError(error.what, where=f"the goal {goal}") from None
    if (higher := after[task]["higher"][metric]) is sweep.lower(goal):
        right, better = ("maximize", "more") if higher else ("minimize", "less")
        raise CompressError(f"of {metric} {better} is better", where=f"the goal {goal}", fix=f"write it in `{right}`")
    value, start = (float(tasks[task]["metrics"][metric]) for tasks in (after, before))
    if higher:
        return value, start - change.upper / 100, start - change.lower / 100
    return value, start + change.lower, start + change.upper


def planned(plan: Plan, sweep: Sweep) -> dict[str, float]:
    """The best value that each goal can reach by a plan: bytes and parameters are exact, what is measured could be perfect."""
    last = plan.stages[-1].passes[-1]
    values = {}
    for goal in sweep.goals:
        if goal in _EXACT and last.spec.exact:
            values[goal] = float(getattr(last.size, _EXACT[goal]))
        else:
            values[goal] = 0.0 if sweep.lower(goal) else math.inf
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
    return fixed(value, 4) if goal.startswith(OF_TASKS) else metrics.table()[goal].text(value)


def title(goal: str) -> str:
    """The name of a goal in tables."""
    known = metrics.table().get(goal)
    return goal.removeprefix(OF_TASKS) if known is None else known.title


def losses(values: Mapping[str, Bounds] | Mapping[str, float], sweep: Sweep) -> list[float]:
    """The values as numbers of which less is better, in the order of the goals; NaN counts as the worst."""
    row = []
    for goal in sweep.goals:
        given = values[goal]
        value = given[0] if isinstance(given, (tuple, list)) else given
        row.append(math.inf if math.isnan(value) else value if sweep.lower(goal) else -value)
    return row
