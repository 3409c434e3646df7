"""Reports as JSON: read and validate."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from compress.errors import ReportError, one_line
from compress.report.parts import Part
from compress.report.schema import Report

SCHEMA = "compress.report/1"


def load(path: Path) -> dict[str, Any]:
    """Read a report; words for NaN and infinities are numbers again. Raises `ReportError` for anything else."""
    return read(path, "report", validate)


def read(path: Path, what: str, validate: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Read and validate the JSON document in a file. ``what``: its kind, for messages. Raises `ReportError` with the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = (
            "there is no such file" if isinstance(error, FileNotFoundError) else f"is not a {what}: {one_line(error)}"
        )
        raise ReportError(reason, where=str(path)) from None
    try:
        return validate(data)
    except ReportError as error:
        error.where = f"{path}: {error.where}" if error.where else str(path)
        raise


def validate(data: Any) -> dict[str, Any]:
    """Validate a report; return plain values. Raises `ReportError` that names the first invalid key."""
    if not isinstance(data, dict) or not str(data.get("schema", "")).startswith("compress.report/"):
        raise ReportError("is not a report of this tool", fix="a run writes report.json into its run folder")
    if data["schema"] != SCHEMA:
        raise ReportError(
            f"is of the schema {data['schema']}, this version reads {SCHEMA}",
            fix="run the recipe again, or use the version that wrote it",
        )
    return checked(Report, data)


def checked(model: type[Part], data: Any) -> dict[str, Any]:
    """Validate JSON values by a model; return plain values. Raises `ReportError` that names the first invalid key."""
    try:
        return model.model_validate(data).model_dump(by_alias=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ReportError(f"is damaged: {first['msg']}", where=".".join(str(p) for p in first["loc"])) from None
    except RecursionError:
        raise ReportError("is damaged: it is nested too deep") from None


@contextlib.contextmanager
def judged(path: str | Path) -> Iterator[None]:
    """Turn arithmetic errors on values of a file into a `ReportError` that names the file."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ReportError(f"its values do not fit together ({reason})", where=str(path)) from error


class _Statistics(Part):
    """Settings of intervals. The number of resamples is bounded, as more would take hours."""

    confidence: float = Field(ge=0.5, lt=1)
    bootstrap: int = Field(ge=100, le=10**9)
    seed: int = Field(ge=0, lt=2**64)


def check_statistics(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Check the settings of intervals in a report's recipe. Raises `ReportError`."""
    try:
        checked(_Statistics, dict(settings))
    except ReportError as error:
        error.where = f"{path}: recipe.resolved.{error.where}"
        raise


def report_schema() -> dict[str, Any]:
    """JSON schema of reports (draft 2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA,
        **Report.model_json_schema(by_alias=True),
    }
