"""Judge gates on measured values: pass, fail or inconclusive. Works on plain report values; needs no torch.

Size, parameters and memory are exact. Metrics of text and timings are samples: the bound is compared with an interval
(`compress.statistics`), and if the interval contains the bound the verdict is inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compress import statistics
from compress.architectures.cache import bytes_at
from compress.errors import EXIT_GATE_FAILED, EXIT_INCONCLUSIVE, EXIT_OK, ReportError
from compress.evaluation import benchmarks, metrics, positions
from compress.evaluation.metrics.base import Metric, Resampling
from compress.formatting import apart, fixed, format_bytes, ratio, signed, signed_percent, significant
from compress.statistics import FEWEST_UNITS, Interval

#: Keys of gates that are no bounds: where the value is measured.
PLACES = ("at", "from_position", "task", "metric")

Verdict = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, slots=True)
class GateResult:
    """One judged bound.

    Attributes:
        gate: for example ``size.max_ratio``. value, bound: as compared. lower, upper: one-sided bounds of the value; None
            if it is exact.
        unit: of the value: bytes, ratio, parameters, relative, absolute, points, share, nats.
        documents_needed: if inconclusive, about how many documents would decide; None if no number would.
        text: one line for people.
    """

    gate: str
    verdict: Verdict
    value: float | None
    bound: float
    lower: float | None
    upper: float | None
    unit: str
    documents_needed: int | None
    text: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def judge(
    gates: Mapping[str, Any],
    original: Mapping[str, Any],
    candidate: Mapping[str, Any],
    *,
    confidence: float = 0.95,
    bootstrap: int = 10_000,
    seed: int = 0,
) -> list[GateResult]:
    """Judge every bound.

    Args:
        gates: ``{"size": {"max_ratio": 0.4}, "bits_per_byte": {"max_increase": {"value": 0.05, "relative": True}}}``. Gates
            of one name may be a list.
        original, candidate: ``size``, ``evaluation`` and ``latency`` as reports hold them.

    Raises:
        ReportError: a gate needs a value that was not measured, or the two were measured on different text.
    """
    resampling = Resampling(confidence, bootstrap, seed)
    results = []
    several = (
        (name, each) for name, gate in gates.items() for each in (gate if isinstance(gate, (list, tuple)) else [gate])
    )
    for name, bounds in several:
        at, first = bounds.get("at"), bounds.get("from_position")
        for key, bound in bounds.items():
            gate = f"{name}.{key}" + (
                f" at {at:,}" if at is not None else f" from {first:,}" if first is not None else ""
            )
            if key in PLACES:
                continue
            if name == "lm_eval":
                results.append(_task(key, bounds, original, candidate, resampling))
            elif name == "cache":
                results.append(_cache(gate, key, bound, at, original, candidate))
            elif at is not None and name in ("prefill", "decode", "memory"):
                results.append(_at_length(gate, name, bound, at, original, candidate, resampling))
            elif name == "throughput":
                results.append(_rate(f"{gate}.min_ratio", key, bound["min_ratio"], original, candidate, resampling))
            elif name in ("size", "parameters"):
                results.append(_exact(gate, name, key, bound, original, candidate))
            elif name == "memory":
                results.append(_memory(gate, bound, original, candidate))
            elif name in ("prefill", "decode"):
                results.append(_speed(gate, name, bound, original, candidate, resampling))
            elif (metric := metrics.table().get(name)) is not None:
                sides = [_at_place(side, metric, at, first) for side in (original, candidate)]
                results.append(_quality(gate, metric, key, bound, sides[0], sides[1], resampling))
            else:
                raise ReportError(f"there is no gate `{name}`")
    if (evaluation := candidate.get("evaluation")) and not _finite(evaluation) and verdict(results)[0] == "passed":
        text = "the model gives NaN or infinite values on the evaluation text"
        results.append(GateResult("evaluation.finite", "fail", math.nan, 0, None, None, "absolute", None, text))
    return results


def verdict(results: Sequence[GateResult]) -> tuple[str, int]:
    """The verdict of all gates together, and the exit status for it."""
    verdicts = {result.verdict for result in results}
    if "fail" in verdicts:
        return "failed", EXIT_GATE_FAILED
    if "inconclusive" in verdicts:
        return "inconclusive", EXIT_INCONCLUSIVE
    return "passed", EXIT_OK


def _get(side: Mapping[str, Any], gate: str, *path: str) -> Any:
    value: Any = side
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            raise ReportError(f"the gate `{gate}` needs {key}, which was not measured")
    return value


def _exact(
    gate: str, name: str, key: str, bound: float, original: Mapping[str, Any], candidate: Mapping[str, Any]
) -> GateResult:
    field = "bytes" if name == "size" else "parameters"
    value = _get(candidate, gate, "size", field)
    show: Callable[[float, int], str] = format_bytes if name == "size" else _parameters
    if key == "max":
        return _plain(gate, value, bound, field, show)
    before = _get(original, gate, "size", field)
    return _ratio(gate, before, value, bound, f"{show(before, 3)} ▶ {show(value, 3)}")


def _parameters(count: float, _: int) -> str:
    return f"{count:,.0f} parameters"


def _ratio(gate: str, before: float, after: float, bound: float, amounts: str) -> GateResult:
    """Judge the ratio of two amounts, which are shown behind it."""
    value = after / before if before else math.nan
    return _plain(gate, value, bound, "ratio", lambda x, digits: f"× {significant(x, digits)}", amounts)


def _memory(gate: str, bound: float, original: Mapping[str, Any], candidate: Mapping[str, Any]) -> GateResult:
    before, after = (_get(side, gate, "latency", "memory", "peak") for side in (original, candidate))
    return _ratio(gate, before, after, bound, f"{format_bytes(before)} ▶ {format_bytes(after)}")


def _cache(
    gate: str, key: str, bound: float, length: int, original: Mapping[str, Any], candidate: Mapping[str, Any]
) -> GateResult:
    after = bytes_at(_get(candidate, gate, "size", "cache"), length)
    if key == "max":
        return _plain(gate, after, bound, "bytes", format_bytes)
    before = bytes_at(_get(original, gate, "size", "cache"), length)
    return _ratio(gate, before, after, bound, f"{format_bytes(before)} ▶ {format_bytes(after)}")


def _at_length(
    gate: str,
    name: str,
    bound: float,
    length: int,
    original: Mapping[str, Any],
    candidate: Mapping[str, Any],
    resampling: Resampling,
) -> GateResult:
    """Judge time or memory at a length; inconclusive where memory was short of it."""
    reasons = {row["length"]: row["reason"] for row in _get(candidate, gate, "latency").get("not_tried") or ()}
    if length in reasons:
        text = f"a prompt of {length:,} tokens was not tried: it {reasons[length]}"
        return GateResult(gate, "inconclusive", None, bound, None, None, "ratio", None, text)
    sides = []
    for side in (original, candidate):
        rows = _get(side, gate, "latency").get("lengths") or ()
        row = next((row for row in rows if row["length"] == length), None)
        if row is None:
            raise ReportError(f"the gate `{gate}` needs a prompt of {length} tokens, which was not measured")
        sides.append({"latency": row})
    if name == "memory":
        return _memory(gate, bound, sides[0], sides[1])
    return _speed(gate, name, bound, sides[0], sides[1], resampling)


def _plain(
    gate: str, value: float, bound: float, unit: str, show: Callable[[float, int], str], amounts: str = ""
) -> GateResult:
    """Judge a value that is exact. ``show``: number and digits ▶ text. ``amounts``: shown behind the value."""
    passed = value <= bound  # False for NaN
    shown, limit = apart(value, bound, show)
    text = f"{shown}{f' ({amounts})' if amounts else ''} {'≤' if passed else 'not ≤'} {limit}"
    return GateResult(gate, "pass" if passed else "fail", value, bound, None, None, unit, None, text)


def _speed(
    gate: str,
    name: str,
    bound: float,
    original: Mapping[str, Any],
    candidate: Mapping[str, Any],
    resampling: Resampling,
) -> GateResult:
    samples = [_get(side, gate, "latency", name, "samples") for side in (original, candidate)]
    interval = statistics.median_ratio(*samples, **asdict(resampling))
    return _judged(gate, interval, bound, "ratio", ratio, "rounds")


def _rate(
    gate: str,
    name: str,
    bound: float,
    original: Mapping[str, Any],
    candidate: Mapping[str, Any],
    resampling: Resampling,
) -> GateResult:
    """Judge tokens per second of a runtime."""
    samples = [_get(side, gate, "throughput", name, "samples") for side in (original, candidate)]
    interval = statistics.median_ratio(*samples, **asdict(resampling))
    return _judged(gate, interval, bound, "ratio", ratio, "rounds", at_least=True)


def _task(
    key: str,
    bounds: Mapping[str, Any],
    original: Mapping[str, Any],
    candidate: Mapping[str, Any],
    resampling: Resampling,
) -> GateResult:
    """Judge a bound on a task of lm-eval."""
    name, gate = bounds["task"], f"lm_eval.{key} of {bounds['task']}"
    before, after = (_get(side, gate, "lm_eval", "tasks", name) for side in (original, candidate))
    metric = benchmarks.metric_of_task(after, bounds.get("metric"), gate)
    bound, higher = bounds[key], after["higher"][metric]
    if higher is (key in ("max", "max_increase")):
        right = "`min` or `max_drop`" if higher else "`max` or `max_increase`"
        raise ReportError(f"the gate `{gate}`: of {metric} {'more' if higher else 'less'} is better; use {right}")
    if key == "max_drop":
        change = benchmarks.task_change(before, after, metric, resampling)
        return _judged(gate, change, float(bound), "points", lambda x: f"{fixed(x, 2)} points", "documents")
    if key == "max_increase":
        relative = bool(bound["relative"])
        change = benchmarks.task_change(before, after, metric, resampling, relative=relative)
        show = signed_percent if relative else (lambda x: signed(x, 4))
        unit = "relative" if relative else "absolute"
        return _judged(gate, change, float(bound["value"]), unit, show, "documents")
    level = benchmarks.task_level(after, metric, resampling)
    return _judged(gate, level, float(bound), "share", lambda x: fixed(x, 4), "documents", at_least=key == "min")


def _at_place(side: Mapping[str, Any], metric: Metric, at: int | None, first: int | None) -> Mapping[str, Any]:
    """A side whose evaluation is the part that a gate asks for: a distance, or the positions from ``first`` on."""
    if (evaluation := side.get("evaluation")) is None or (at is None and first is None):
        return side
    part = positions.beyond(evaluation, first) if first is not None else metric.at(evaluation, at or 0)
    return {**side, "evaluation": part}


def _quality(
    gate: str,
    metric: Metric,
    key: str,
    bound: Any,
    original: Mapping[str, Any],
    candidate: Mapping[str, Any],
    resampling: Resampling,
) -> GateResult:
    after = _get(candidate, gate, "evaluation")
    _get(after, gate, metric.name)
    show: Callable[[float], str]
    unit_name = metric.units(after)
    if key == "max_increase":
        if not isinstance(bound, Mapping):
            raise ReportError(f"the gate `{gate}` has no value")
        relative, limit = bool(bound["relative"]), float(bound["value"])
        before = _get(original, gate, "evaluation")
        interval = metric.increase(before, after, resampling, relative=relative)
        show = signed_percent if relative else (lambda x: signed(x, metric.decimals or 4))
        unit = "relative" if relative else "absolute"
    elif key == "max_drop":
        limit, unit, show = float(bound), "points", (lambda x: f"{fixed(x, 2)} points")
        before = original["evaluation"] if metric.compares else _get(original, gate, "evaluation")
        interval = metric.drop(before, after, resampling)
    else:  # `max` or `min`
        interval, limit, unit, show = metric.level(after, resampling), float(bound), metric.unit, metric.text
    compared = key in ("max_increase", "max_drop") and original["evaluation"] is not None
    if not _finite(after) or (compared and not _finite(original["evaluation"])):
        interval = Interval(math.nan, math.nan, math.nan, interval.units)
    return _judged(gate, interval, limit, unit, show, unit_name, at_least=key == "min")


def _finite(evaluation: Mapping[str, Any]) -> bool:
    values = (value for row in evaluation["documents"] for value in row.values() if isinstance(value, float))
    return all(math.isfinite(value) for value in values)


def _judged(
    gate: str,
    interval: Interval,
    bound: float,
    unit: str,
    show: Any,
    units: str,
    *,
    at_least: bool = False,
) -> GateResult:
    """Pass if the whole interval is within the bound, fail if all of it is beyond it, else inconclusive. NaN fails."""
    sign = "≥" if at_least else "≤"
    within = interval.lower >= bound if at_least else interval.upper <= bound
    beyond = interval.upper < bound if at_least else interval.lower > bound
    if not interval.finite:
        return GateResult(gate, "fail", interval.value, bound, None, None, unit, None, "NaN or infinite: fails")
    shown = f"{show(interval.value)} (between {show(interval.lower)} and {show(interval.upper)})"
    needed = None
    result: Verdict
    if interval.units < FEWEST_UNITS:
        result, needed = "inconclusive", FEWEST_UNITS
        text = f"{shown} {sign} {show(bound)}? {interval.units} {units} are too few to tell; give {needed} or more"
    elif within:
        result, text = "pass", f"{shown} {sign} {show(bound)}"
    elif beyond:
        result, text = "fail", f"{shown} not {sign} {show(bound)}"
    else:
        result, needed = "inconclusive", statistics.documents_needed(interval, bound)
        how_many = f"about {needed:,} {units} would decide" if needed else "no number of documents would decide"
        text = f"{shown} {sign} {show(bound)}? The {interval.units} {units} do not tell; {how_many}"
    return GateResult(gate, result, interval.value, bound, interval.lower, interval.upper, unit, needed, text)
