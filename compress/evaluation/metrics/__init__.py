"""The metrics of evaluations: a file each, and entry points of the group ``compress.metrics`` from other packages.

Nothing else registers a metric. Recipes, gates, reports and the command line read this table.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from inspect import isabstract
from typing import Any

from compress.evaluation.metrics.base import Kind, Metric, Resampling, Scored
from compress.extensions import entry_points


@cache
def table() -> dict[str, Metric]:
    """All metrics by name, in order of their ``place``."""
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    classes = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Metric) and hasattr(value, "name") and not isabstract(value)
    }
    metrics = [each() for each in classes]
    metrics += [point.load()() for point in entry_points("compress.metrics")]
    return {metric.name: metric for metric in sorted(metrics, key=lambda metric: (metric.place, metric.name))}


def of_kind(kind: str) -> list[Metric]:
    """Metrics of a kind of evaluation."""
    return [metric for metric in table().values() if kind in metric.evaluations]


def of_evaluation(evaluation: Scored) -> list[Metric]:
    """Metrics of an evaluation, those that compare with the original last."""
    kind = str(evaluation["schema"]).removeprefix("compress.").partition("/")[0]
    return sorted(of_kind(kind), key=lambda metric: metric.compares)


def values(kind: Kind, evaluation: Scored) -> dict[str, float | None]:
    """The value of every metric of the kind, by name. ``evaluation``: its ``unit``, ``documents``, and ``labels``."""
    return {metric.name: metric.value(evaluation) for metric in of_kind(kind)}


def headline(evaluation: Scored | None) -> Metric:
    """The metric that summaries show: the first that has a value of the original, else the first that compares with it."""
    if evaluation is None:
        return of_kind("evaluation")[0]
    candidates = of_evaluation(evaluation)
    return next((m for m in candidates if evaluation.get(m.name) is not None or m.compares), candidates[0])


def compare(
    before: Scored, after: Scored, *, confidence: float, bootstrap: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Compare two evaluations by the numbers that gates judge, each with its interval.

    Returns:
        JSON values: the settings, ``unit``, ``units``, and for each metric its relative increase (``increase``), its drop in
        points (``drop``), or its level (``value``) if it compares with the original; each with ``lower`` and ``upper``.
    """
    resampling = Resampling(confidence, bootstrap, seed)
    result: dict[str, Any] = {"confidence": confidence, "bootstrap": bootstrap, "seed": seed}
    result |= {"unit": after["unit"], "units": len(after["documents"])}
    for metric in table().values():
        if after.get(metric.name) is not None and (entry := metric.paired(before, after, resampling)) is not None:
            result[metric.name] = entry
    return result
