"""Settings of an evaluation, and stored baselines: documents of an earlier evaluation that a later one is compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as a_field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from compress.data import kinds, row_templates
from compress.errors import DataError, ReportError
from compress.evaluation.tasks import OF_PASSES, Given
from compress.report.document import checked
from compress.report.document import read as read_document
from compress.report.parts import Part
from compress.report.schema import Latency, Measured, SizeRow
from compress.settings import Settings

SCHEMA = "compress.eval/1"


@dataclass(frozen=True)
class EvaluationSettings:
    """Metrics, data and computation of an evaluation; kept in its document, so that a later one can be paired with it.

    Attributes:
        files: of text. images: a folder of images in place of files. separator: line between documents of text files.
        field, template, text, label: columns of files, as in a recipe's ``data.evaluation``.
        window, stride: tokens; None for a stride of one window. streaming: read documents through the cache.
        max_documents: None for all.
        metric_settings: metric ▶ its settings as JSON values, where they are not the defaults.
        metrics: None for those of the model's task that need no other checkpoint.
        device, dtype: of computation. quantized_kv_cache: round keys and values where the config says so.
    """

    files: tuple[str, ...] = ()
    images: str | None = None
    separator: str | None = None
    field: str = kinds.FIELD
    template: str | None = None
    text: tuple[str, ...] | None = None
    label: str | None = None
    window: int = 256
    stride: int | None = None
    streaming: bool = False
    max_documents: int | None = None
    metrics: tuple[str, ...] | None = None
    metric_settings: Mapping[str, Mapping[str, Any]] = a_field(default_factory=dict)
    device: str = "auto"
    dtype: str = "float32"
    quantized_kv_cache: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of labelled texts."""
        return self.text or (kinds.FIELD,)

    @property
    def given(self) -> Given | None:
        """The kind of the data; None without data."""
        if self.images is not None:
            return "images"
        return None if not self.files else "text" if self.label is None else "labelled"

    def of_passes(self, metrics: Sequence[str]) -> dict[str, Settings]:
        """Those of the metrics that make forward passes of their own, with their settings.

        Raises:
            ReportError: the settings, which came from a stored baseline, are not those of the metric.
        """
        chosen = {}
        for name in (name for name in metrics if name in OF_PASSES):
            text = json.dumps(self.metric_settings.get(name, {}))
            try:
                chosen[name] = OF_PASSES[name].settings.model_validate_json(text, strict=True)
            except ValidationError as error:
                raise ReportError(f"the settings of {name}: {error.errors()[0]['msg']}") from None
        return chosen

    def check_columns(self) -> None:
        """Check that the columns go together. Raises `DataError`."""
        if self.text is not None and self.label is None:
            raise DataError(
                "`text` names columns of labelled files, and no column of labels is named",
                fix="name it: `label`; the column of plain text is `field`",
            )
        if self.template is None:
            return
        try:
            row_templates.template_columns(self.template)
        except ValueError as error:
            raise DataError(str(error)) from None
        if self.label is not None or self.field != kinds.FIELD:
            raise DataError("`template` names the columns of plain text", fix="leave out `field`, `text` and `label`")
        if wrong := next((file for file in self.files if kinds.kind(file) not in kinds.FIELD_KINDS), None):
            raise DataError("has no columns, which `template` names", where=wrong)

    def paired_with(self, baseline: dict[str, Any]) -> EvaluationSettings:
        """These settings with those of a stored baseline, whose data are taken too where none are named."""
        known = baseline["settings"]
        data = {} if self.given else {"files": tuple(known["files"]), "images": known.get("images")}
        return replace(
            self,
            **data,
            separator=known["separator"],
            field=known.get("field", kinds.FIELD),
            template=known.get("template"),
            text=known.get("text") and tuple(known["text"]),
            label=known.get("label"),
            window=known["window"],
            stride=known["stride"],
            streaming=known.get("streaming", False),
            max_documents=known["max_documents"],
            metric_settings={**known.get("metric_settings", {}), **self.metric_settings},
            dtype=known["dtype"],
            quantized_kv_cache=known.get("quantized_kv_cache", True),
        )


class _Settings(Part):
    """Settings of a stored baseline."""

    files: list[str]
    images: str | None = None
    separator: str | None
    field: str = kinds.FIELD
    template: str | None = None
    text: list[str] | None = Field(default=None, min_length=1)
    label: str | None = None
    window: int = Field(ge=2, le=2**31)
    stride: int | None = Field(ge=1, le=2**31)
    streaming: bool = False
    max_documents: int | None = Field(ge=1, le=2**53)
    metric_settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float16"]
    quantized_kv_cache: bool = True
    text_sha256: str | None


class _Baseline(Part):
    """The document of an evaluation, as a later one reads it."""

    checkpoint: str = Field(pattern=r"^[^\x00]+$")
    size: SizeRow
    evaluation: Measured | None
    latency: Latency | None
    settings: _Settings


def read_baseline(path: Path) -> dict[str, Any]:
    """A stored baseline. Raises `ReportError` for anything else."""

    def validate(data: Any) -> dict[str, Any]:
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ReportError("is not a baseline", fix="write one with `compress eval CHECKPOINT --json`")
        return checked(_Baseline, data)

    return read_document(path, "baseline", validate)
