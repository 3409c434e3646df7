"""Functions that measure and judge: evaluate, gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.api.documents import EvaluatedCheckpoint
from compress.api.guarded import guarded
from compress.api.recipes import read_recipe
from compress.progress import Progress
from compress.progress.display import chosen

if TYPE_CHECKING:
    from compress.pipeline.baseline import EvaluationSettings
    from compress.pipeline.gate import Judgement


@guarded
def evaluate(
    checkpoint: str | Path,
    *,
    data: str | Path | Sequence[str | Path] = (),
    metrics: Sequence[str] = (),
    baseline: str | Path | None = None,
    field: str = "text",
    template: str | None = None,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    document_separator: str | None = None,
    window: int = 256,
    stride: int | None = None,
    streaming: bool = False,
    max_documents: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    quantized_kv_cache: bool = True,
    confidence: float = 0.95,
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    allow_links: bool = False,
    offline: bool = False,
    progress: Progress | bool | None = None,
) -> EvaluatedCheckpoint:
    """Measure a checkpoint as a recipe would; with a baseline, compare it with another one.

    Args:
        checkpoint: a folder, or a hub id.
        data: text files, `default`, or a folder with one folder of images for each class. Without data only size is measured.
        metrics: such as ``kl``, or ``latency.lengths=[512,2048]`` for a setting; by default those of the model's task.
        baseline: another checkpoint, or a file that ``compress eval --json`` wrote.
        field, template, text, label, document_separator, window, stride, streaming, max_documents: as in a recipe's
            ``data.evaluation``; window and stride are tokens.
        quantized_kv_cache: round keys and values where the config says so. confidence: of the intervals.

    Returns:
        A dictionary, schema ``compress.eval/1``: ``size``, ``evaluation``, ``latency``, ``settings``; with a baseline also
        ``baseline`` (the same keys) and ``paired`` (differences with intervals).

    Raises:
        CompressError: a metric does not fit the model or the data, or something cannot be read.
    """
    from compress.checkpoint.sidecars import with_links
    from compress.pipeline.evaluate import evaluate as evaluate_checkpoint

    settings = _settings(
        data, metrics, text, field=field, template=template, label=label, separator=document_separator, window=window,
        stride=stride, streaming=streaming, max_documents=max_documents, device=device, dtype=dtype,
        quantized_kv_cache=quantized_kv_cache,
    )  # fmt: skip
    with chosen(progress) as shown:
        document = evaluate_checkpoint(
            with_links(checkpoint, allow_links), settings,
            baseline=None if baseline is None else with_links(baseline, allow_links), confidence=confidence,
            trust_remote_code=trust_remote_code, ignore_auto_map=ignore_auto_map, offline=offline, progress=shown,
        )  # fmt: skip
    return EvaluatedCheckpoint(document)


def _settings(
    data: str | Path | Sequence[str | Path], metrics: Sequence[str], text: str | Sequence[str] | None, **others: Any
) -> EvaluationSettings:
    """The settings of an evaluation. ``others``: those that are taken as they are. Raises `RecipeError` for a metric."""
    from compress.pipeline.baseline import EvaluationSettings
    from compress.recipe import read_metrics

    entries = read_metrics(metrics)
    files = (str(data),) if isinstance(data, (str, Path)) else tuple(map(str, data))
    images = files[0] if len(files) == 1 and Path(files[0]).is_dir() else None
    return EvaluationSettings(
        files=() if images else files,
        images=images,
        text=None if not text else (text,) if isinstance(text, str) else tuple(text),
        metrics=tuple(entry.name for entry in entries) or None,
        metric_settings={e.name: e.settings.model_dump(mode="json") for e in entries if e.settings and not e.plain},
        **others,
    )


@guarded
def gate(
    subject: str | Path,
    *,
    baseline: str | Path | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    gates: Mapping[str, Any] | Sequence[str] = (),
    confidence: float | None = None,
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    allow_links: bool = False,
    offline: bool = False,
    progress: Progress | bool | None = None,
) -> Judgement:
    """Judge the report of a run, or a checkpoint against a baseline. A failed gate raises nothing.

    Args:
        subject: a report.json, or a checkpoint. baseline: for a checkpoint, another one or a file of ``compress eval --json``.
        recipe: its gates, data and settings of the evaluation are used.
        gates: a mapping as in a recipe, ``{"bits_per_byte": {"max_increase": "3%"}}``, or texts such as
            ``bits_per_byte.max_increase=3%``. confidence: of the intervals; by default the recipe's or the report's.

    Returns:
        A `compress.pipeline.gate.Judgement`: ``status`` (str: passed, failed, inconclusive), ``passed`` (bool),
        ``exit_status`` (int), ``gates`` (list of dictionaries), ``to_dict()`` (schema ``compress.verdict/1``).

    Raises:
        CompressError: there is no gate to judge, or a value that one needs was not measured.
    """
    from compress.checkpoint.sidecars import with_links
    from compress.pipeline.gate import gate as judge

    with chosen(progress) as shown:
        return judge(
            with_links(subject, allow_links),
            baseline=None if baseline is None else with_links(baseline, allow_links),
            recipe=None if recipe is None else read_recipe(recipe),
            gates=gates,
            confidence=confidence,
            trust_remote_code=trust_remote_code,
            ignore_auto_map=ignore_auto_map,
            offline=offline,
            progress=shown,
        )
