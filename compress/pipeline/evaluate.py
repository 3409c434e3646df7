"""Evaluation and gates outside a run: of a checkpoint by itself, or against a baseline."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress.checkpoint.open import Stored, open_checkpoint
from compress.checkpoint.running import emulated
from compress.data import images, text
from compress.errors import CompressError, DataError, ReportError
from compress.evaluation.scorer import Scorer, load_processor, read
from compress.evaluation.tasks import PAIRED, SPEED_METRICS, TEXT_METRICS, Given, check_metrics, check_speed, task_of
from compress.pipeline.fingerprint import versions
from compress.pipeline.machine import check_dtype, machine, resolve_device
from compress.planning import size_on_disk
from compress.progress import Progress, SilentProgress
from compress.report.document import Latency, Measured, Part, SizeRow, checked, judged
from compress.report.document import read as read_document

if TYPE_CHECKING:
    from compress.gates import GateResult
    from compress.recipe import Recipe

SCHEMA = "compress.eval/1"


@dataclass(frozen=True)
class Assessment:
    """What to measure, and how; kept in the result so that a later one can be paired with it.

    ``metrics``: None for those of the model's task that need no other checkpoint.
    ``images``: a folder of images in place of files. ``text`` and ``label``: columns of labelled files, as in a recipe.
    """

    files: tuple[str, ...] = ()
    images: str | None = None
    separator: str | None = None
    field: str = text.FIELD
    template: str | None = None
    text: tuple[str, ...] | None = None
    label: str | None = None
    window: int = 256
    stride: int | None = None
    max_documents: int | None = None
    metrics: tuple[str, ...] | None = None
    device: str = "auto"
    dtype: str = "float32"
    quantized_kv_cache: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of labelled texts."""
        return self.text or (text.FIELD,)

    @property
    def given(self) -> Given | None:
        """What the data are; None where there are none."""
        if self.images is not None:
            return "images"
        return None if not self.files else "text" if self.label is None else "labelled"


def assess(
    checkpoint: str,
    how: Assessment,
    *,
    baseline: str | None = None,
    confidence: float = 0.95,
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint: size always, text metrics on ``how.files``, speed beside the baseline.

    Args:
        baseline: a checkpoint, measured too; or a document of this function, whose settings and text are taken.

    Returns:
        JSON values, schema ``compress.eval/1``: ``checkpoint``, ``size``, ``evaluation``, ``latency``, ``settings``,
        and with a baseline ``baseline`` (the same keys) and ``paired`` (differences with intervals).
    """
    progress = progress or SilentProgress()
    unknown = set(how.metrics or ()) - TEXT_METRICS - SPEED_METRICS
    if unknown:
        raise CompressError(
            f"unknown metric `{min(unknown)}`", fix=f"there are: {', '.join(sorted(TEXT_METRICS | SPEED_METRICS))}"
        )
    stored_baseline = read_assessment(Path(baseline)) if baseline is not None and Path(baseline).is_file() else None
    if stored_baseline is not None:
        known = stored_baseline["settings"]
        how = replace(
            how,
            **({} if how.given else {"files": tuple(known["files"]), "images": known.get("images")}),
            separator=known["separator"],
            field=known.get("field", text.FIELD),
            template=known.get("template"),
            text=known.get("text") and tuple(known["text"]),
            label=known.get("label"),
            window=known["window"],
            stride=known["stride"],
            max_documents=known["max_documents"],
            dtype=known["dtype"],
            quantized_kv_cache=known.get("quantized_kv_cache", True),
        )
    if how.text is not None and how.label is None:
        raise DataError(
            "`text` names columns of labelled files, and no column of labels is named",
            fix="name it: `label`; the column of plain text is `field`",
        )
    if how.template is not None:
        _check_template(how)
    opening: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "ignore_auto_map": ignore_auto_map,
        "offline": offline,
    }
    candidate = open_checkpoint(checkpoint, **opening)
    for note in candidate.spec.notes:
        progress.message(note)
    class_name = candidate.spec.structure.class_name
    task = task_of(class_name)
    metrics: tuple[str, ...] = how.metrics or ()
    if how.metrics is None and how.given:
        possible = [m for m in task.measurable(how.given) if m not in PAIRED]
        metrics = tuple(possible) or task.measurable(how.given) or task.default
    check_metrics(class_name, metrics, given=how.given)
    check_speed(class_name, candidate.spec.structure.config, metrics)
    check_dtype(how.dtype)
    if how.stride is not None and how.stride > how.window:
        raise DataError(f"a stride of {how.stride} would skip text, as the window is {how.window} tokens")
    how = replace(how, metrics=metrics, device=resolve_device(how.device), stride=how.stride or how.window)
    reference: Stored | None = None
    wants = set(metrics)
    if baseline is not None and stored_baseline is None:
        reference = open_checkpoint(baseline, **opening)
    elif stored_baseline is not None and wants & (PAIRED | SPEED_METRICS):
        reference = open_checkpoint(stored_baseline["checkpoint"], **opening)
    if wants & (PAIRED | SPEED_METRICS) and reference is None:
        metric = min(wants & (PAIRED | SPEED_METRICS))
        raise CompressError(f"`{metric}` compares with another checkpoint", fix="give --baseline")
    if wants & TEXT_METRICS and not how.given:
        raise DataError("text metrics need text", fix="give --data")
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "checkpoint": checkpoint,
        "versions": versions(),
        "machine": machine(how.device),
        "settings": {**asdict(how), "text_sha256": _sha256(how, candidate)},
        "size": asdict(size_on_disk(candidate)),
        "evaluation": None,
        "latency": None,
    }
    other: dict[str, Any] | None = None
    if stored_baseline is not None:
        if how.given and stored_baseline["settings"]["text_sha256"] != document["settings"]["text_sha256"]:
            raise ReportError(
                "the baseline was measured on other data", where=str(baseline), fix="name the same files with --data"
            )
        other = {key: stored_baseline[key] for key in ("checkpoint", "size", "evaluation", "latency")}
    elif reference is not None:
        other = {"checkpoint": baseline, "size": asdict(size_on_disk(reference)), "evaluation": None, "latency": None}
    if wants & TEXT_METRICS:
        _text(candidate, reference, other, how, document, progress)
    if wants & SPEED_METRICS and other is not None and reference is not None:
        from compress.evaluation.latency import measure_latency

        assert reference.folder is not None
        assert candidate.folder is not None
        measured = measure_latency(
            [reference.folder, candidate.folder],
            dtype=how.dtype,
            device=how.device,
            trust_remote_code=trust_remote_code,
            ignore_auto_map=ignore_auto_map,
            progress=progress,
        )
        other["latency"] = measured["original"]
        document["latency"] = {**measured["candidate"], "left_out": emulated(candidate.spec, kv_cache=True)}
    if other is not None:
        document["baseline"] = other
        if document["evaluation"] is not None and other["evaluation"] is not None:
            from compress.statistics import compare

            with judged(str(baseline)) if stored_baseline is not None else contextlib.nullcontext():
                document["paired"] = compare(other["evaluation"], document["evaluation"], confidence=confidence)
    return document


def _check_template(how: Assessment) -> None:
    """Raises `DataError` where it cannot be used, as a recipe would say."""
    assert how.template is not None
    try:
        text.template_columns(how.template)
    except ValueError as error:
        raise DataError(str(error)) from None
    if how.label is not None or how.field != text.FIELD:
        raise DataError("`template` names the columns of plain text", fix="leave out `field`, `text` and `label`")
    if wrong := next((file for file in how.files if text.kind(file) not in text.FIELD_KINDS), None):
        raise DataError("has no columns, which `template` names", where=wrong)


def _text(
    candidate: Stored,
    reference: Stored | None,
    other: dict[str, Any] | None,
    how: Assessment,
    document: dict[str, Any],
    progress: Progress,
) -> None:
    from compress.models.loading import load_checkpoint

    structure = candidate.spec.structure
    documents = read(how, how.separator, structure)[: how.max_documents]
    assert candidate.folder is not None
    loading: dict[str, Any] = {"dtype": how.dtype, "device": how.device, "quantized_kv_cache": how.quantized_kv_cache}
    model = load_checkpoint(candidate, **loading)
    beside = None if reference is None else load_checkpoint(reference, **loading)
    processor = load_processor(structure, candidate.folder, trust_remote_code=candidate.trust_remote_code)
    score = Scorer(structure, candidate.folder, processor, documents, how, progress)
    document["evaluation"] = _noted(score(model, beside), candidate, how)
    if other is not None and other["evaluation"] is None and beside is not None:
        assert reference is not None
        other["evaluation"] = _noted(score(beside), reference, how)


def _noted(evaluation: dict[str, Any], checkpoint: Stored, how: Assessment) -> dict[str, Any]:
    """An evaluation that says what was rounded as runtimes do."""
    return {**evaluation, "emulated": emulated(checkpoint.spec, kv_cache=how.quantized_kv_cache)}


def _sha256(how: Assessment, candidate: Stored) -> str | None:
    """Of the data."""
    if how.given == "images":
        return images.fingerprint(read(how, how.separator, candidate.spec.structure))
    return text.fingerprint(how.files) if how.files else None


class _Settings(Part):
    """How a stored baseline was measured."""

    files: list[str]
    images: str | None = None
    separator: str | None
    field: str = text.FIELD
    template: str | None = None
    text: list[str] | None = Field(default=None, min_length=1)
    label: str | None = None
    window: int = Field(ge=2, le=2**31)
    stride: int | None = Field(ge=1, le=2**31)
    max_documents: int | None = Field(ge=1, le=2**53)
    dtype: Literal["float32", "bfloat16", "float16"]
    quantized_kv_cache: bool = True
    text_sha256: str | None


class _Baseline(Part):
    """What `assess` gives and a later one reads."""

    checkpoint: str = Field(pattern=r"^[^\x00]+$")
    size: SizeRow
    evaluation: Measured | None
    latency: Latency | None
    settings: _Settings


def read_assessment(path: Path) -> dict[str, Any]:
    """A stored baseline. Raises `ReportError` for anything else."""

    def validate(data: Any) -> dict[str, Any]:
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ReportError("is no baseline", fix="write one with `compress eval CHECKPOINT --json`")
        return checked(_Baseline, data)

    return read_document(path, "baseline", validate)


def judge_checkpoint(
    checkpoint: str,
    baseline: str,
    gates: Mapping[str, Any],
    *,
    recipe: Recipe | None,
    confidence: float | None,
    trust_remote_code: bool,
    ignore_auto_map: bool,
    offline: bool,
    progress: Progress,
) -> tuple[list[GateResult], dict[str, Any]]:
    """Measure what the gates need of a checkpoint and its baseline, and judge. Returns results and statistical settings."""
    from compress.gates import judge

    metrics = tuple(sorted({_METRIC.get(key, key) for key in gates} & (TEXT_METRICS | SPEED_METRICS)))
    how = Assessment(metrics=metrics)
    if recipe is not None and recipe.data.evaluation is not None:
        section = recipe.data.evaluation
        how = replace(
            how,
            files=tuple(section.files),
            images=section.images,
            separator=recipe.document_separator,
            field=section.field,
            template=section.template,
            text=section.text,
            label=section.label,
            window=section.window,
            stride=section.stride,
            max_documents=section.max_documents,
            device=recipe.device,
            dtype=recipe.dtype,
            quantized_kv_cache=section.quantized_kv_cache,
        )
    document = assess(
        checkpoint,
        how,
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
    with judged(baseline) if Path(baseline).is_file() else contextlib.nullcontext():
        return judge(gates, document["baseline"], document, **settings), settings


#: Gates that read another metric's measurement.
_METRIC = {"prefill": "latency", "decode": "latency"}
