"""Figures of a run for MLflow and Weights & Biases."""

from __future__ import annotations

import json

import pytest

from compress.errors import CompressError
from compress.pipeline import trackers
from compress.progress import SilentProgress
from compress.recipe import recipe_from_mapping, resolved
from tests import pico


class Told(SilentProgress):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a run without text: two passes, no evaluation."""
    from compress.pipeline.run import run

    folder = tmp_path_factory.mktemp("tracked")
    passes = [
        {"prune_unstructured": {"method": "magnitude", "sparsity": "50%"}},
        {"cast": {"weights": "int8", "method": "rtn"}},
    ]
    recipe = {"model": str(pico.folder("llama")), "output": str(folder / "small"), "passes": passes}
    return run(recipe_from_mapping({**recipe, "gates": {"size": {"max_ratio": 0.9}}})).report


def recipe_with(report, **log):
    return recipe_from_mapping({**report["recipe"]["resolved"], "log": log})


def test_recipe_names_trackers_and_is_else_as_before(report):
    assert "log" not in report["recipe"]["resolved"]
    recipe = recipe_with(report, mlflow="sizes")
    assert resolved(recipe)["log"] == {"mlflow": "sizes"}
    assert recipe_from_mapping(resolved(recipe)).log == recipe.log


def test_a_package_that_is_not_there_is_refused_with_the_cure(report, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    trackers.check_trackers(recipe_with(report))
    with pytest.raises(CompressError) as caught:
        trackers.check_trackers(recipe_with(report, wandb="sizes"))
    assert str(caught.value) == ("log.wandb: needs the package wandb; pip install 'compress-toolkit[wandb]'")


def test_figures_are_those_of_the_report(report):
    run = trackers.tracked(report)
    assert [step["bytes"] for step in run.steps] == [
        report["original"]["size"]["bytes"],
        *(row["actual"]["bytes"] for stage in report["stages"] for row in stage["passes"]),
    ]
    assert run.steps[-1]["original.parameters"] == report["original"]["size"]["parameters"]
    assert run.steps[-1]["kept_parameters"] == report["result"]["size"]["kept_parameters"]
    assert run.settings["passes.0.prune_unstructured"] == "method: magnitude, sparsity: 50%"
    assert [file.name for file in run.files] == ["report.html", "report.json"]
    assert run.status == "passed"


def test_a_tracker_that_fails_is_told(report, monkeypatch):
    def fails(name, run):
        raise ConnectionError("no server\nhere")

    monkeypatch.setattr(trackers, "_TRACKERS", {"mlflow": fails})
    progress = Told()
    trackers.track(recipe_with(report, mlflow="sizes"), report, progress)
    assert progress.messages == ["mlflow did not take the figures: ConnectionError: no server here"]


@pytest.mark.slow
def test_mlflow_has_the_figures(report, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    trackers.track(recipe_with(report, mlflow="sizes"), report, progress := Told())
    assert progress.messages == ["figures: mlflow, sizes"]
    (run,) = mlflow.search_runs(experiment_names=["sizes"], output_format="list")
    assert run.data.metrics["bytes"] == report["result"]["size"]["bytes"]
    assert run.data.params["passes.1.cast"] == "weights: int8, method: rtn"


@pytest.mark.slow
def test_wandb_offline_keeps_the_figures_in_the_run_folder(report, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.track(recipe_with(report, wandb="sizes"), report, progress := Told())
    assert progress.messages == ["figures: wandb, sizes"]
    (folder,) = tmp_path.parent.glob("tracked*/small.run/wandb/offline-run-*")
    assert json.dumps("passes.1.cast")[1:-1].encode() in next(folder.glob("*.wandb")).read_bytes()
