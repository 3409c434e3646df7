"""Numbers of a report as rows of text: before ▶ after, the waterfall of passes, details. Every renderer uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compress.errors import ReportError
from compress.evaluation import metrics
from compress.evaluation.benchmarks import task_change
from compress.evaluation.metrics.base import Metric, Resampling
from compress.formatting import fixed, format_bytes, ratio, ratio_of, seconds_text, signed, signed_percent, significant
from compress.report.brief_recipe import changed
from compress.settings import as_written


@dataclass(frozen=True, slots=True)
class Row:
    """One measured quantity, as text. ``timed``: another run would measure another value."""

    name: str
    before: str
    after: str
    change: str
    timed: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One pass, or the original (``saved`` is 0).

    Attributes:
        bytes: after the pass. saved: bytes that the pass removed. share: bytes over the original's.
        quality: value of the `headline` metric after the stage that the pass ends; None inside a fused stage.
        cost: how much worse it is than at the last measurement. kl: KL from the original, nats.
        seconds: of the stage; None inside a fused stage. predicted: of applying and writing it, before it was computed.
    """

    name: str
    settings: str
    bytes: int
    saved: int
    share: float
    quality: float | None
    cost: float | None
    kl: float | None
    seconds: float | None
    predicted: float | None
    reused: bool


def headline(report: Mapping[str, Any]) -> Metric:
    """The metric that the waterfall shows."""
    return metrics.headline(report["original"]["evaluation"])


def headline_cells(metric: Metric, step: Step) -> tuple[str, str]:
    """Value and cost of a step as text; empty if not measured."""
    value = "" if step.quality is None else metric.text(step.quality)
    return value, "" if step.cost is None else metric.cost_text(step.cost)


def before_after(report: Mapping[str, Any]) -> list[Row]:
    """A row for each measured quantity of the original and the result."""
    first, last = report["original"], report["result"]
    a, b = first["size"], last["size"]
    rows = [Row("size", format_bytes(a["bytes"]), format_bytes(b["bytes"]), ratio_of(a["bytes"], b["bytes"]))]
    rows.append(
        Row("parameters", _count(a["parameters"]), _count(b["parameters"]), ratio_of(a["parameters"], b["parameters"]))
    )
    if a["kept_parameters"] != a["parameters"] or b["kept_parameters"] != b["parameters"]:
        kept = (a["kept_parameters"], b["kept_parameters"])
        rows.append(Row("parameters kept", _count(kept[0]), _count(kept[1]), ratio_of(*kept)))
    if b["active_parameters"] != b["parameters"]:
        active = (a["active_parameters"], b["active_parameters"])
        rows.append(Row("active parameters", _count(active[0]), _count(active[1]), ratio_of(*active)))
    bits = (a["bits_per_weight"], b["bits_per_weight"])
    rows.append(Row("bits per weight", f"{bits[0]:.2f}", f"{bits[1]:.2f}", ratio_of(*bits)))
    cache = (a["kv_bytes_per_token"], b["kv_bytes_per_token"])
    if None not in cache:
        rows.append(Row("KV cache per token", format_bytes(cache[0]), format_bytes(cache[1]), ratio_of(*cache)))
    loaded = (a["load_bytes"], b["load_bytes"])
    decoded = ", decoded when loaded" if loaded[1] > 1.02 * b["bytes"] else ""
    rows.append(Row("weights in memory", format_bytes(loaded[0]), format_bytes(loaded[1]), ratio_of(*loaded) + decoded))
    return rows + (
        _quality(first["evaluation"], last["evaluation"])
        + _speed(first["latency"], last["latency"])
        + _throughput(first.get("throughput"), last.get("throughput"))
        + _task_rows(first.get("lm_eval"), last.get("lm_eval"))
    )


#: A sentence on the bars of the `waterfall`.
BARS = "█ bytes that are left, ░ bytes that the pass saved; the whole bar is the original"


def row_notes(report: Mapping[str, Any]) -> list[str]:
    """Sentences on the rows of `before_after` whose names do not say all."""
    first, last = (report[side]["size"] for side in ("original", "result"))
    notes = ["bits per weight: stored bits over all parameters"]
    if any(size["kept_parameters"] != size["parameters"] for size in (first, last)):
        notes.append("parameters kept: without those that pruning set to 0")
    rates = report["result"].get("throughput")
    if rates is not None:
        notes.append(
            f"{rates['runtime']} prefill, decode: tokens per second, of a prompt of {rates['prompt']}, and one by one"
        )
        if variables := rates.get("variables"):
            given = " ".join(f"{name}={value}" for name, value in variables.items())
            notes.append(f"{rates['runtime']} had {given}")
    decoded = last["load_bytes"] > 1.02 * last["bytes"] and report["recipe"]["resolved"]["store"] == "stock"
    runtime = "; vLLM keeps codes and computes with them" if decoded else ""
    return [*notes, f"weights in memory: once transformers has loaded them{runtime}"]


_VERDICTS = {
    "passed": "every gate passed",
    "failed": "a gate FAILED",
    "inconclusive": "a gate is INCONCLUSIVE",
    "no gates": "no gates",
}


def verdict_text(report: Mapping[str, Any]) -> str:
    """Bytes before and after, the change of the headline metric, and the verdict of the gates, in one line."""
    sizes = [report[side]["size"]["bytes"] for side in ("original", "result")]
    before, after = map(format_bytes, sizes)
    quality = "".join(f", {_changed(row)}" for row in _headline_quality(report))
    verdict = _VERDICTS[report["status"]]
    if report["status"] == "inconclusive" and not report["gates"]:
        verdict = "a training did NOT HELP"
    change = f" ({ratio_of(*sizes)})" if sizes[0] else ""
    return f"{before} ▶ {after}{change}{quality}; {verdict}" + ("" if report["published"] else ", not published")


def _changed(row: Row) -> str:
    """Name and change of a quality, or its value where the change is a unit."""
    return f"{row.name} {row.change}" if row.change[:1] in ("+", "-") else f"{row.name} {row.after}"


def _headline_quality(report: Mapping[str, Any]) -> list[Row]:
    """The first row of the qualities, if any was measured."""
    return _quality(report["original"]["evaluation"], report["result"]["evaluation"])[:1]


def headline_rows(report: Mapping[str, Any]) -> list[Row]:
    """The few rows of `before_after` that tell a run in short: size, parameters, quality, speed."""
    rows = before_after(report)
    kept = next((row for row in rows if row.name == "parameters kept"), rows[1])
    return [rows[0], kept, *_headline_quality(report), *(row for row in rows if row.timed)]


def worst_documents(report: Mapping[str, Any], count: int) -> list[tuple[str, ...]]:
    """The documents whose loss grew most: id, tokens, nats per token before and after, difference.

    Empty where documents have no such loss, or the two evaluations differ in documents.
    """
    sides = [(report[side]["evaluation"] or {}).get("documents") or [] for side in ("original", "result")]
    rows = []
    for x, y in zip(*sides, strict=False):
        if x["id"] != y["id"] or not x.get("tokens") or x["tokens"] != y.get("tokens"):
            return []
        before, after = x["nll"] / x["tokens"], y["nll"] / y["tokens"]
        rows.append((after - before, x["id"], x["tokens"], before, after))
    rows.sort(key=lambda row: -row[0])
    return [
        (f"`{name}`", f"{tokens:,}", fixed(before, 4), fixed(after, 4), signed(more, 4))
        for more, name, tokens, before, after in rows[:count]
    ]


def _quality(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[Row]:
    if before is None or after is None:
        return []
    return [Row(*cells) for metric in metrics.of_evaluation(after) for cells in metric.rows(before, after)]


def _speed(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[Row]:
    if before is None or after is None:
        return []
    rows = []
    for key, name in (("prefill", f"prefill {after['prompt']} tokens"), ("decode", "decode a token")):
        x, y = before[key], after[key]
        if x is None or y is None:
            continue
        change = f"{ratio(y['ratio'])} ({significant(y['lower'])} to {significant(y['upper'])})"
        rows.append(Row(name, seconds_text(x["median"]), seconds_text(y["median"]), change, timed=True))
    x, y = before["memory"]["peak"], after["memory"]["peak"]
    rows.append(Row("memory of inference", format_bytes(x), format_bytes(y), ratio_of(x, y), timed=True))
    return rows


def _throughput(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[Row]:
    if before is None or after is None:
        return []
    rows = []
    for key in ("prefill", "decode"):
        x, y = before[key]["median"], after[key]
        change = f"{ratio(y['ratio'])} ({significant(y['lower'])} to {significant(y['upper'])})"
        old, new = (f"{significant(rate)} tok/s" for rate in (x, y["median"]))
        rows.append(Row(f"{after['runtime']} {key}", old, new, change, timed=True))
    return rows


def _task_rows(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[Row]:
    """A row for each metric of each task of lm-eval: drops in points, increases as shares, with their intervals."""
    rows = []
    for name, task in after["tasks"].items() if before is not None and after is not None else ():
        for metric, value in task["metrics"].items():
            first = before["tasks"][name]  # type: ignore[index]
            x, y = fixed(first["metrics"][metric], 4), fixed(value, 4)
            rows.append(Row(f"{name}: {metric}", x, y, _task_change(first, task, metric)))
    return rows


def _task_change(before: Mapping[str, Any], after: Mapping[str, Any], metric: str) -> str:
    """The paired change of a task's metric; empty where documents have no values of it."""
    try:
        change = task_change(before, after, metric, Resampling(), relative=True)
    except ReportError:
        return ""
    if before["higher"][metric]:
        ends = [signed(-value, 2) for value in (change.value, change.upper, change.lower)]
        return f"{ends[0]} points ({ends[1]} to {ends[2]})"
    return f"{signed_percent(change.value)} ({signed_percent(change.lower)} to {signed_percent(change.upper)})"


def position_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Loss by position: a row for each bin, headed by `position_head`; empty where there are fewer than two bins.

    Args:
        result: part of a report or document of an evaluation, with ``positions`` where it is beside an original.
    """
    paired = result.get("positions")
    rows = paired or (result.get("evaluation") or {}).get("positions") or []
    if len(rows) < 2:
        return []
    return [(_range(row), f"{row['tokens']:,}", *(_paired_cells if paired else _cells)(row)) for row in rows]


def _range(row: Mapping[str, Any]) -> str:
    return f"{row['from']:,} to {row['to']:,}"


def _paired_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    bits, nats = ([fixed(x, 4) for x in row[key]] for key in ("bits_per_byte", "nats_per_token"))
    change = f"{signed_percent(row['increase'])} ({signed_percent(row['lower'])} to {signed_percent(row['upper'])})"
    return *bits, change, " ▶ ".join(nats), "" if row["kl"] is None else fixed(row["kl"], 4)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return fixed(row["bits_per_byte"], 4), fixed(row["nats_per_token"], 4)


def position_head(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Head of `position_rows`."""
    if result.get("positions"):
        return "position", "tokens", "before", "after", "bits per byte", "nats per token", "KL"
    return "position", "tokens", "bits per byte", "nats per token"


def waterfall(report: Mapping[str, Any]) -> list[Step]:
    """The original, then every pass in order."""
    start = report["original"]["size"]["bytes"]
    evaluation, shown = report["original"]["evaluation"], headline(report)
    last = None if evaluation is None else shown.perfect if shown.compares else evaluation[shown.name]
    steps = [Step("original", "", start, 0, 1.0, last, None, None, None, None, False)]
    for stage in report["stages"]:
        for row in stage["passes"]:
            ends = row is stage["passes"][-1]
            measured = stage["evaluation"] if ends else None
            now = measured[shown.name] if measured else None
            size = row["actual"]["bytes"]
            steps.append(
                Step(
                    name=row["name"],
                    settings=changed_settings(row["name"], row["settings"]),
                    bytes=size,
                    saved=steps[-1].bytes - size,
                    share=size / start if start else 0.0,
                    quality=now,
                    cost=shown.cost(last, now) if now is not None and last is not None else None,
                    kl=measured.get("kl") if measured else None,
                    seconds=sum(stage["seconds"].values()) if ends else None,
                    predicted=stage.get("predicted_seconds") if ends else None,
                    reused=stage["reused"],
                )
            )
            last = now if now is not None else last
    return steps


def losses_file(report: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Name of the picture of a training pass's losses, beside the report."""
    number = next(
        i for i, each in enumerate((r for stage in report["stages"] for r in stage["passes"]), 1) if each is row
    )
    return f"losses-{number}.svg"


def changed_settings(name: str, settings: Mapping[str, Any]) -> str:
    """Settings that differ from the defaults of the pass, as ``layers: 1, …``."""
    return ", ".join(f"{key}: {as_written(value)}" for key, value in changed(name, settings).items())


def bar(step: Step, width: int) -> str:
    """A bar: remaining bytes as ``█``, bytes that this pass saved as ``░``."""
    if not step.share:
        return ""
    start = step.bytes / step.share
    left = round(width * step.share)
    before = round(width * (step.bytes + max(step.saved, 0)) / start)
    return "█" * left + "░" * max(before - left, 0)


def signed_bytes(saved: int) -> str:
    """Saved bytes with a minus sign, added ones with a plus."""
    return "" if saved == 0 else f"{'-' if saved > 0 else '+'}{format_bytes(abs(saved))}"


def quality_note(report: Mapping[str, Any]) -> str | None:
    """A sentence on the evaluation: documents, files, windows; None without evaluation."""
    evaluation = report["result"]["evaluation"]
    data = report["data"].get("evaluation") or {}
    if evaluation is None:
        return None
    files = ", ".join(str(f).replace("\\", "/").rpartition("/")[2] for f in data.get("files", ()))
    units = _UNITS[evaluation["schema"]].format(**{"of": "texts", **evaluation})
    note = f"{len(evaluation['documents'])} {units} of {files or 'text'}"
    return note + _NOTES[evaluation["schema"]](evaluation) + _emulated(evaluation)


_UNITS = {
    "compress.evaluation/1": "{unit}s",
    "compress.classification/1": "labelled {of}",
    "compress.masked/1": "{unit}s",
    "compress.embeddings/1": "texts or pairs of texts",
}
_NOTES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "compress.evaluation/1": lambda e: f"{_windows(e)}{_few(e)}",
    "compress.classification/1": lambda e: f", {len(e['labels'])} labels; F1 is the mean over labels (macro){_cut(e)}",
    "compress.masked/1": lambda e: f", windows of {e['window']} tokens, {e['share']:.0%} of them masked{_few(e)}",
    "compress.embeddings/1": lambda e: f", pooling: {', '.join(e['pooling'])}{_cut(e)}",
}


def _windows(evaluation: Mapping[str, Any]) -> str:
    if evaluation.get("streaming"):
        return f", read through the cache in segments of {evaluation['window']} tokens"
    return f", windows of {evaluation['window']} tokens, stride {evaluation['stride']}"


def _few(evaluation: Mapping[str, Any]) -> str:
    few = "; as documents are few, chunks of them are resampled, which makes intervals slightly too narrow"
    return few if evaluation["unit"] == "chunk" else ""


def speed_note(report: Mapping[str, Any]) -> str | None:
    """A sentence on emulated rounding that the timed model leaves out; None without any."""
    latency = report["result"]["latency"]
    left_out = _rounded(latency.get("left_out")) if latency else ""
    return (
        f"times and memory were measured without {left_out}, as emulation is slower than a runtime"
        if left_out
        else None
    )


def _emulated(evaluation: Mapping[str, Any]) -> str:
    """Rounded inputs and caches that the metrics include, as text."""
    rounded = _rounded(evaluation.get("emulated"))
    return f"; with {rounded}, as a runtime computes" if rounded else ""


def _rounded(emulated: Mapping[str, Any] | None) -> str:
    if not emulated:
        return ""
    parts = [f"inputs of {n} linear layers in {name}" for name, n in emulated["activations"].items()]
    return " and ".join(parts + ([f"keys and values in {emulated['kv_cache']}"] if emulated["kv_cache"] else []))


def _cut(evaluation: Mapping[str, Any]) -> str:
    return f"; {evaluation['cut']} truncated to the model's length" if evaluation["cut"] else ""


def _count(number: float) -> str:
    return f"{number:,}" if number < 1e7 else f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
