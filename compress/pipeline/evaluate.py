"""Evaluation and gates outside a run: evaluate one checkpoint, compare it with a baseline, judge it by gates."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.architectures.unforeseen import refused
from compress.checkpoint.open import Stored, open_checkpoint
from compress.checkpoint.running import emulated
from compress.data import documents, images
from compress.data.default_text import located, named
from compress.errors import CompressError, DataError, ReportError
from compress.evaluation import positions
from compress.evaluation.latency_settings import LatencySettings
from compress.evaluation.metrics.base import Resampling
from compress.evaluation.scorer import Scorer, load_processor, read
from compress.evaluation.tasks import (
    OF_PASSES,
    PAIRED,
    SPEED_METRICS,
    TEXT_METRICS,
    check_metrics,
    check_speed,
    check_streaming,
    task_of,
)
from compress.pipeline.baseline import SCHEMA, EvaluationSettings, read_baseline
from compress.pipeline.fingerprint import versions
from compress.pipeline.hub_data import with_hub_data
from compress.pipeline.machine import check_dtype, machine, resolve_device
from compress.planning import size_on_disk
from compress.progress import Progress, SilentProgress
from compress.recipe.gates import distances_of, lengths_of, metric_of
from compress.report.document import judged

if TYPE_CHECKING:
    from compress.gates import GateResult
    from compress.recipe import Recipe


@dataclass(frozen=True)
class _Reading:
    """How checkpoints are opened."""

    trust_remote_code: bool
    ignore_auto_map: bool
    offline: bool

    def open(self, checkpoint: str | Path) -> Stored:
        return open_checkpoint(checkpoint, **asdict(self))


def evaluate(
    checkpoint: str | Path,
    settings: EvaluationSettings,
    *,
    baseline: str | Path | None = None,
    confidence: float = 0.95,
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint: its size always, metrics on the settings' data, speed in turn with the baseline's.

    Args:
        baseline: a checkpoint, which is evaluated too; or a document of this function, whose settings and data are taken.

    Returns:
        JSON values, schema ``compress.eval/1``: ``checkpoint``, ``size``, ``evaluation``, ``latency``, ``settings``,
        and with a baseline ``baseline`` (the same keys), ``paired`` and ``positions`` (differences with intervals).
    """
    progress, reading = progress or SilentProgress(), _Reading(trust_remote_code, ignore_auto_map, offline)
    if "throughput" in (settings.metrics or ()):
        raise CompressError("`throughput` is measured by `compress run`", fix="write it below `evaluate` of a recipe")
    if unknown := set(settings.metrics or ()) - TEXT_METRICS - SPEED_METRICS:
        known = ", ".join(sorted(TEXT_METRICS | SPEED_METRICS))
        raise CompressError(f"unknown metric `{min(unknown)}`", fix=f"there are: {known}")
    earlier = read_baseline(Path(baseline)) if baseline is not None and Path(baseline).is_file() else None
    if earlier is not None:
        settings = settings.paired_with(earlier)
    settings.check_columns()
    candidate = reading.open(checkpoint)
    for note in candidate.spec.notes:
        progress.message(note)
    settings = _completed(settings, candidate)
    reference = _reference(settings, baseline, earlier, reading)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "checkpoint": str(checkpoint),
        "versions": versions(),
        "machine": machine(settings.device),
        "settings": {**asdict(settings), "text_sha256": _sha256(settings, candidate)},
        "size": asdict(size_on_disk(candidate)),
        "evaluation": None,
        "latency": None,
    }
    other = _baseline_part(baseline, earlier, reference, document["settings"], settings)
    if TEXT_METRICS & set(settings.metrics or ()):
        _evaluate_data(candidate, reference, other, settings, document, progress)
    if SPEED_METRICS & set(settings.metrics or ()) and other is not None and reference is not None:
        _measure_speed(candidate, reference, other, settings, document, reading, progress)
    if other is not None:
        document["baseline"] = other
        if document["evaluation"] is not None and other["evaluation"] is not None:
            from compress.evaluation.metrics import compare

            first, last = other["evaluation"], document["evaluation"]
            with judged(str(baseline)) if earlier is not None else contextlib.nullcontext():
                document["paired"] = compare(first, last, confidence=confidence)
                document["positions"] = positions.paired(first, last, Resampling(confidence))
    return document


def _completed(settings: EvaluationSettings, candidate: Stored) -> EvaluationSettings:
    """The settings with metrics, device and stride filled in, checked against the model. Raises `CompressError`."""
    structure, given = candidate.spec.structure, settings.given
    task = task_of(structure.class_name)
    metrics: tuple[str, ...] = settings.metrics or ()
    if settings.metrics is None and given:
        possible = [m for m in task.measurable(given) if m not in PAIRED and m not in OF_PASSES]
        metrics = tuple(possible) or task.measurable(given) or task.default
    check_metrics(structure.class_name, metrics, given=given)
    check_speed(structure.class_name, structure.config, metrics)
    check_dtype(settings.dtype)
    if settings.stride is not None and settings.stride > settings.window:
        raise DataError(f"a stride of {settings.stride} would skip text, as the window is {settings.window} tokens")
    if settings.streaming and settings.stride not in (None, settings.window):
        raise DataError("segments that are streamed do not overlap", fix="leave out the stride")
    check_streaming(structure.class_name, settings.streaming)
    limit = model_map(candidate.spec).positions or structure.config.get("max_position_embeddings")
    for name, chosen in settings.of_passes(metrics).items():
        OF_PASSES[name].check(chosen, window=settings.window, positions=limit)
    return replace(
        settings, metrics=metrics, device=resolve_device(settings.device), stride=settings.stride or settings.window
    )


def _reference(
    settings: EvaluationSettings, baseline: str | Path | None, earlier: dict[str, Any] | None, reading: _Reading
) -> Stored | None:
    """The checkpoint to compare with, open; None where nothing of it is computed.

    Raises:
        CompressError: a metric compares and there is no baseline, or a metric needs data and there are none.
    """
    wanted, reference = set(settings.metrics or ()), None
    if baseline is not None and earlier is None:
        reference = reading.open(baseline)
    elif earlier is not None and wanted & (PAIRED | SPEED_METRICS):
        reference = reading.open(earlier["checkpoint"])
    if wanted & (PAIRED | SPEED_METRICS) and reference is None:
        metric = min(wanted & (PAIRED | SPEED_METRICS))
        raise CompressError(f"`{metric}` compares with another checkpoint", fix="give --baseline")
    if wanted & TEXT_METRICS and not settings.given:
        raise DataError("text metrics need text", fix="give --data")
    return reference


def _baseline_part(
    baseline: str | Path | None,
    earlier: dict[str, Any] | None,
    reference: Stored | None,
    kept: Mapping[str, Any],
    settings: EvaluationSettings,
) -> dict[str, Any] | None:
    """The baseline's part of the document: that of an earlier evaluation, or one to fill; None without a baseline.

    Args:
        kept: the settings as the document holds them.

    Raises:
        ReportError: the earlier evaluation was made on other data.
    """
    if earlier is not None:
        if settings.given and earlier["settings"]["text_sha256"] != kept["text_sha256"]:
            raise ReportError(
                "the baseline was evaluated on other data", where=str(baseline), fix="name the same files with --data"
            )
        return {key: earlier[key] for key in ("checkpoint", "size", "evaluation", "latency")}
    if reference is None:
        return None
    return {"checkpoint": str(baseline), "size": asdict(size_on_disk(reference)), "evaluation": None, "latency": None}


def _evaluate_data(
    candidate: Stored,
    reference: Stored | None,
    other: dict[str, Any] | None,
    settings: EvaluationSettings,
    document: dict[str, Any],
    progress: Progress,
) -> None:
    """Evaluate on the data: the candidate into the document, and the reference into ``other`` where it has no evaluation."""
    from compress.models.loading import load_checkpoint

    structure = candidate.spec.structure
    documents = read(settings, settings.separator, structure)[: settings.max_documents]
    assert candidate.folder is not None
    processor = load_processor(structure, candidate.folder, trust_remote_code=candidate.trust_remote_code)
    measured = settings.of_passes(settings.metrics or ())
    score = Scorer(structure, candidate.folder, processor, documents, settings, progress, measured)
    for each in filter(None, (candidate, reference)):
        score.check(each.spec)
    for name, chosen in measured.items():
        OF_PASSES[name].check_data(processor, documents, chosen, window=settings.window)
    loading: dict[str, Any] = {
        "dtype": settings.dtype,
        "device": settings.device,
        "quantized_kv_cache": settings.quantized_kv_cache,
    }
    model = load_checkpoint(candidate, **loading)
    beside = None if reference is None else load_checkpoint(reference, **loading)
    with refused(candidate.spec, "the evaluation", of_class=True):
        document["evaluation"] = _noted(score(model, beside), candidate, settings)
    if other is not None and other["evaluation"] is None and beside is not None:
        assert reference is not None
        other["evaluation"] = _noted(score(beside), reference, settings)


def _measure_speed(
    candidate: Stored,
    reference: Stored,
    other: dict[str, Any],
    settings: EvaluationSettings,
    document: dict[str, Any],
    reading: _Reading,
    progress: Progress,
) -> None:
    """Measure candidate and reference in turn; ``latency`` of the document and of ``other`` is set."""
    from compress.evaluation.latency import measure_latency
    from compress.evaluation.latency_lengths import with_planned

    assert reference.folder is not None
    assert candidate.folder is not None
    measured = measure_latency(
        [reference.folder, candidate.folder],
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=reading.trust_remote_code,
        ignore_auto_map=reading.ignore_auto_map,
        lengths=_lengths(settings, candidate),
        progress=progress,
    )
    other["latency"] = with_planned(measured["original"], reference.spec)
    document["latency"] = with_planned(measured["candidate"], candidate.spec)
    document["latency"]["left_out"] = emulated(candidate.spec, kv_cache=True)


def _lengths(settings: EvaluationSettings, candidate: Stored) -> LatencySettings:
    """The settings of latency. Raises `CompressError` for a length beyond the model's positions."""
    asked = dict(settings.metric_settings.get("latency", {}))
    asked["lengths"] = tuple(asked["lengths"]) if asked.get("lengths") else None
    lengths, positions = LatencySettings(**asked), model_map(candidate.spec).trained_positions
    if lengths.lengths and positions is not None and lengths.lengths[-1] > positions:
        raise CompressError(f"a prompt of {lengths.lengths[-1]} tokens is beyond the model's {positions} positions")
    return lengths


def _noted(evaluation: dict[str, Any], checkpoint: Stored, settings: EvaluationSettings) -> dict[str, Any]:
    """The evaluation with a list of what was rounded as runtimes round it."""
    return {**evaluation, "emulated": emulated(checkpoint.spec, kv_cache=settings.quantized_kv_cache)}


def _sha256(settings: EvaluationSettings, candidate: Stored) -> str | None:
    """SHA-256 of the data; None without data."""
    if settings.given == "images":
        return images.fingerprint(read(settings, settings.separator, candidate.spec.structure))
    return documents.fingerprint([located(f, "evaluation") for f in settings.files]) if settings.files else None


def judge_checkpoint(
    checkpoint: str | Path,
    baseline: str | Path,
    gates: Mapping[str, Any],
    *,
    recipe: Recipe | None,
    confidence: float | None,
    trust_remote_code: bool,
    ignore_auto_map: bool,
    offline: bool,
    progress: Progress,
) -> tuple[list[GateResult], dict[str, Any]]:
    """Evaluate a checkpoint and its baseline by the metrics that the gates need, and judge.

    Args:
        recipe: names data and settings of the evaluation; the defaults without one.

    Returns:
        A result for each gate, and the statistical settings ``confidence``, ``bootstrap`` and ``seed``.
    """
    from compress.gates import judge

    document = evaluate(
        checkpoint,
        _settings_for(gates, recipe),
        baseline=baseline,
        trust_remote_code=trust_remote_code,
        ignore_auto_map=ignore_auto_map,
        offline=offline,
        progress=progress,
    )
    settings: dict[str, Any] = {
        "confidence": confidence if confidence is not None else recipe.confidence if recipe is not None else 0.95,
        "bootstrap": recipe.bootstrap if recipe is not None else 10000,
        "seed": recipe.seed if recipe is not None else 0,
    }
    with judged(str(baseline)) if Path(baseline).is_file() else contextlib.nullcontext():
        return judge(gates, document["baseline"], document, **settings), settings


def _settings_for(gates: Mapping[str, Any], recipe: Recipe | None) -> EvaluationSettings:
    """The settings of the evaluation that gates need."""
    metrics = tuple(sorted({metric_of(gate) or "" for gate in gates} & (TEXT_METRICS | SPEED_METRICS)))
    asked = {} if recipe is None else {e.name: e.settings for e in recipe.evaluate or () if e.settings and not e.plain}
    given = {name: settings.model_dump(mode="json") for name, settings in asked.items()}
    if at := lengths_of(gates):
        latency = given.setdefault("latency", {})
        latency["lengths"] = sorted({*(latency.get("lengths") or ()), *at})
    if at := distances_of(gates):
        repetition = given.setdefault("repetition", {})
        repetition["distances"] = sorted({*(repetition.get("distances") or ()), *at})
    if recipe is None or recipe.data.evaluation is None:
        return EvaluationSettings(metrics=metrics, metric_settings=given)
    section = with_hub_data(recipe).data.evaluation
    assert section is not None
    return EvaluationSettings(
        files=tuple(map(named, section.files)),
        images=section.images,
        separator=recipe.document_separator,
        field=section.field,
        template=section.template,
        text=section.text,
        label=section.label,
        window=section.window,
        stride=section.stride,
        streaming=section.streaming,
        max_documents=section.max_documents,
        metrics=metrics,
        metric_settings=given,
        device=recipe.device,
        dtype=recipe.dtype,
        quantized_kv_cache=section.quantized_kv_cache,
    )
