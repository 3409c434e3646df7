"""The cells of a class: passes as a user applies them, and an evaluation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import compress
from benchmarks.families.judge import Judge, Wrong
from benchmarks.families.pico import SAMPLES, Pico
from compress.errors import CompressError


@dataclass(frozen=True)
class Cell:
    """A column of the matrix.

    Attributes:
        title: of the column. name: of the pass, None for an evaluation. settings: of the pass.
        calibrated: the pass gets data.
    """

    title: str
    name: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = True


#: One epoch, as ten cells of a hundred classes would train all day.
_ONCE = {"reconstruction_epochs": 1}
CELLS: dict[str, Cell] = {
    "rtn": Cell("int8 rtn", "cast", {"weights": "int8", "method": "rtn"}, calibrated=False),
    "gptq": Cell("int4 gptq", "cast", {"weights": "int4", "method": "gptq"}),
    "magnitude": Cell(
        "50 % magnitude", "prune_unstructured", {"method": "magnitude", "sparsity": 0.5}, calibrated=False
    ),
    "sparsegpt": Cell("50 % sparsegpt", "prune_unstructured", {"method": "sparsegpt", "sparsity": 0.5}),
    "layers": Cell("a layer", "prune_structured", {"layers": 1}),
    "mlp": Cell("25 % mlp", "prune_structured", {"mlp": 0.25, **_ONCE}),
    "heads": Cell("50 % heads", "prune_structured", {"heads": 0.5, **_ONCE}),
    "share": Cell("share", "share", {"groups": [[0, 1]], "store": "compact"}),
    "factorize": Cell(
        "factorize", "factorize", {"keep_parameters": 0.5, "allocation": "uniform", "store": "compact", **_ONCE}
    ),
    "distill": Cell("distill", "distill", {"steps": 1, "batch_size": 2, "validation_samples": 1, "allow_noop": True}),
    "eval": Cell("eval", None),
}


#: What a refusal says that is to be tried next.
ADVICE = "`store: compact`"


def run(cell: str, pico: Pico, work: Path, judge: Judge) -> str:
    """Run a cell and have it judged. A refusal that says "use `store: compact`" is followed.

    Returns:
        What differed from the cell's settings; usually empty.

    Raises:
        CompressError: the cell is refused.
        Wrong: the stock loader disagrees. Any other exception is a fault as well.
    """
    if CELLS[cell].name is None:
        _evaluate(pico, judge)
        return ""
    try:
        _apply(cell, pico, work / cell, judge)
    except CompressError as error:
        if f"use {ADVICE}" not in str(error) or "store" in CELLS[cell].settings:
            raise
        _apply(cell, pico, work / f"{cell}-compact", judge, store="compact")
        return ADVICE
    return ""


def _apply(cell: str, pico: Pico, to: Path, judge: Judge, **others: Any) -> None:
    """Apply the pass of a cell, write the result, and have it judged."""
    what = CELLS[cell]
    assert what.name is not None
    settings = {**what.settings, **others}
    if what.calibrated:
        settings["data"] = pico.data
        if isinstance(pico.data, Path):
            settings["samples"] = SAMPLES if cell != "distill" else None
    if cell == "distill":
        settings["teacher"] = [{"checkpoint": str(pico.other)}]
    details: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compress.apply(what.name, pico.folder, to, details=details, **settings)
    judge.written(to, pico, lossy=cell != "distill" or bool(details.get("training", {}).get("helped")))


def _evaluate(pico: Pico, judge: Judge) -> None:
    """Evaluate the checkpoint as ``compress eval`` does with the data of its task, and compare with transformers."""
    from compress.pipeline.baseline import EvaluationSettings
    from compress.pipeline.evaluate import evaluate

    document = evaluate(str(pico.folder), EvaluationSettings(**_evaluation(pico)))
    measured = document["evaluation"]
    rows, kind = measured["documents"], measured["schema"].partition(".")[2].partition("/")[0]
    if not rows or any(not math.isfinite(row["nll"]) for row in rows if "nll" in row):
        raise Wrong("the evaluation is empty or not finite")
    task: Callable[..., None] | None = {"evaluation": judge.perplexity}.get(kind)
    if task is not None:
        task(pico, sum(row["nll"] for row in rows), sum(row["tokens"] for row in rows))


def _evaluation(pico: Pico) -> dict[str, Any]:
    if pico.main_input == "pixel_values" and pico.images.exists():
        return {"images": str(pico.images)}
    if pico.class_name.endswith("ForSequenceClassification"):
        return {"files": (str(pico.rows),), "text": ("sentence",), "label": "label"}
    return {"files": (str(pico.text),), "separator": "<|doc|>", "window": 64}
