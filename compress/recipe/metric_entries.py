"""The list of metrics in a recipe: one entry is a metric by name, or with settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError, PydanticKnownError

from compress.evaluation import metrics
from compress.evaluation.latency_settings import LatencySettings
from compress.evaluation.lm_eval_settings import LmEvalSettings
from compress.evaluation.throughput_settings import ThroughputSettings
from compress.recipe.gates import METRICS
from compress.recipe.suggest import choices
from compress.settings import Settings, distinct

#: Metric ▶ model of its settings. A metric that is not here is written as a bare name.
SETTINGS: Mapping[str, type[Settings]] = {
    **{metric.name: metric.settings for metric in metrics.table().values() if metric.settings is not None},
    "latency": LatencySettings,
    "throughput": ThroughputSettings,
    "lm_eval": LmEvalSettings,
}


@dataclass(frozen=True)
class MetricEntry:
    """One metric to measure; ``settings`` is an instance of the metric's model, None for a metric without settings."""

    name: str
    settings: Settings | None = None

    @property
    def plain(self) -> bool:
        """Whether every setting has its default, so that the bare name says the same."""
        return self.settings is None or self.settings == type(self.settings)()


def parse_metric(value: Any) -> MetricEntry:
    """An entry from a name, or from ``{name: settings}``.

    Raises `ValidationError`, `PydanticCustomError` or `PydanticKnownError`; inside pydantic these get the path of the entry.
    """
    if isinstance(value, MetricEntry):
        return value
    if isinstance(value, str):
        if value not in METRICS:
            names = [f"'{name}'" for name in METRICS]
            expected = f"{', '.join(names[:-1])} or {names[-1]}"
            raise PydanticKnownError("literal_error", {"expected": expected})
        return _entry(value, None)
    if not isinstance(value, dict):
        raise PydanticCustomError("metric_entry", "expected a metric, as `name` or `name: {settings}`")
    if len(value) != 1:
        given = ", ".join(f"`{key}`" for key in value) or "none"
        hint = "an entry is `- name` or `- name: {settings}`; settings stand below the name, indented further than it"
        raise PydanticCustomError("metric_entry", "expected one metric, got {given}", {"given": given, "hint": hint})
    name, settings = next(iter(value.items()))
    if name not in METRICS:
        hint = choices(name, METRICS, "evaluate") or ""
        raise PydanticCustomError("metric_entry", "unknown metric `{name}`", {"name": name, "hint": hint})
    return _entry(name, settings)


def _entry(name: str, settings: Any) -> MetricEntry:
    model = SETTINGS.get(name)
    if model is not None and isinstance(settings, model):
        return MetricEntry(name, settings)
    if settings is not None and not isinstance(settings, dict):
        hint = f"as `{name}: {{setting: value}}`" if model else f"write `{name}`"
        raise PydanticCustomError(
            "metric_entry",
            "{name}: expected a mapping of settings, got {value}",
            {"name": name, "value": repr(settings), "hint": hint},
        )
    if model is None:
        if settings:
            raise PydanticCustomError(
                "metric_entry", "{name} has no settings", {"name": name, "hint": f"write `{name}`"}
            )
        return MetricEntry(name)
    # validated as JSON: strict about types, but a list serves as a tuple
    return MetricEntry(name, model.model_validate_json(json.dumps(settings or {}), strict=True))


def _distinct(entries: tuple[MetricEntry, ...]) -> tuple[MetricEntry, ...]:
    distinct(tuple(entry.name for entry in entries))
    return entries


RecipeMetric = Annotated[
    MetricEntry, PlainValidator(parse_metric), WithJsonSchema({"enum": list(METRICS), "type": "string"})
]
RecipeMetrics = Annotated[tuple[RecipeMetric, ...], AfterValidator(_distinct)]
