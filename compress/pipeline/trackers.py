"""Figures of a finished run for MLflow and Weights & Biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, one_line
from compress.evaluation import metrics
from compress.report import figures
from compress.report.brief_recipe import brief

if TYPE_CHECKING:
    from compress.progress import Progress
    from compress.recipe import Recipe
    from compress.recipe.log import Log

#: Key of `log` ▶ the package that it needs.
_PACKAGES = {"mlflow": "mlflow", "wandb": "wandb"}


@dataclass(frozen=True)
class Tracked:
    """The figures of a run, as a tracker gets them.

    Attributes:
        name: of the output. settings: by key of the recipe. status: of the gates.
        steps: figures of the original, then of each pass; the last has all of the result. files: the reports.
    """

    name: str
    settings: Mapping[str, str]
    status: str
    steps: Sequence[Mapping[str, float]]
    files: Sequence[Path]


def check_trackers(recipe: Recipe) -> None:
    """Raise `CompressError` without the package of a tracker that the recipe names."""
    for key in _asked(recipe.log):
        if find_spec(_PACKAGES[key]) is None:
            raise CompressError(
                f"needs the package {_PACKAGES[key]}",
                where=f"log.{key}",
                fix=f"pip install 'compress-toolkit[{key}]'",
            )


def track(recipe: Recipe, report: Mapping[str, Any], progress: Progress) -> None:
    """Send a report to the trackers of the recipe. A tracker that fails is told, and leaves the run as it is."""
    for key, name in _asked(recipe.log).items():
        try:
            _TRACKERS[key](name, tracked(report))
            progress.message(f"figures: {key}, {name}")
        except Exception as error:  # a server may answer anything
            progress.message(f"{key} did not take the figures: {type(error).__name__}: {one_line(error)}")


def tracked(report: Mapping[str, Any]) -> Tracked:
    """The figures of a report, as trackers take them."""
    recipe, shown = brief(report["recipe"]["resolved"]), figures.headline(report)
    settings: dict[str, str] = {key: str(recipe[key]) for key in recipe.keys() & {"model", "output", "store"}}
    rows = [row for stage in report["stages"] for row in stage["passes"]]
    for number, row in enumerate(rows):
        settings[f"passes.{number}.{row['name']}"] = figures.changed_settings(row["name"], row["settings"])[:500]
    steps = [
        {"bytes": float(step.bytes)} | ({} if step.quality is None else {shown.name: step.quality})
        for step in figures.waterfall(report)
    ]
    steps[-1] = steps[-1] | _all_figures(report)
    run_folder = Path(report["run_folder"])
    files = [file for name in ("report.html", "report.json") if (file := run_folder / name).is_file()]
    return Tracked(Path(report["output"]).name, settings, report["status"], steps, files)


def _all_figures(report: Mapping[str, Any]) -> dict[str, float]:
    """Figures of the result that are finite, and those of the original with ``original.`` before them."""
    values: dict[str, float] = {"seconds": report["seconds"]}
    for side, prefix in (("original", "original."), ("result", "")):
        part = report[side]
        values |= {f"{prefix}{key}": part["size"][key] for key in ("bytes", "parameters", "kept_parameters")}
        if (evaluation := part["evaluation"]) is not None:
            known = {metric.name: evaluation.get(metric.name) for metric in metrics.of_evaluation(evaluation)}
            values |= {f"{prefix}{name}": value for name, value in known.items() if value is not None}
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def _asked(log: Log) -> dict[str, str]:
    return {key: name for key in _PACKAGES if (name := getattr(log, key)) is not None}


def _mlflow(experiment: str, run: Tracked) -> None:
    import mlflow

    mlflow.set_experiment(experiment)
    with mlflow.start_run(run_name=run.name, tags={"status": run.status}):
        mlflow.log_params(dict(run.settings))
        for number, values in enumerate(run.steps):
            mlflow.log_metrics(dict(values), step=number)
        for file in run.files:
            mlflow.log_artifact(str(file))


def _wandb(project: str, run: Tracked) -> None:
    import wandb

    folder, quiet = run.files[0].parent, wandb.Settings(silent=True, console="off")
    with wandb.init(project=project, name=run.name, config=dict(run.settings), dir=folder, settings=quiet) as logged:
        for number, values in enumerate(run.steps):
            logged.log(dict(values), step=number)
        logged.summary["status"] = run.status
        artifact = wandb.Artifact(f"report-{logged.id}", type="report")
        for file in run.files:
            artifact.add_file(str(file))
        logged.log_artifact(artifact)


_TRACKERS: Mapping[str, Callable[[str, Tracked], None]] = {"mlflow": _mlflow, "wandb": _wandb}
