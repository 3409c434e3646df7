"""`calibration: default`: text that comes with the package, small, of one source, and shared with no evaluation."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from jsonschema import Draft202012Validator

import compress
from compress.data import default_text
from compress.data.disjoint import check_disjoint
from compress.data.documents import read_documents
from compress.recipe import load_recipe, recipe_from_mapping, recipe_schema, resolved
from tests import pico
from tools.default_text import texts

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {
    "model": "examples/tiny-lm",
    "output": "out",
    "data": {"calibration": "default", "evaluation": "default"},
    "passes": [{"cast": {"scheme": "W4A16"}}],
}


def test_default_text_is_made_from_the_examples_and_small():
    made = texts()
    assert {path: path.read_text(encoding="utf-8") for path in made} == made
    assert sum(path.stat().st_size for path in made) <= 300_000
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["compress"]
    shipped = {path for pattern in patterns for path in (ROOT / "compress").glob(pattern)}
    assert {*made, made and next(iter(made)).parent / "README.md"} <= shipped


def test_default_text_of_passes_is_in_no_evaluation():
    evaluation, calibration = (
        read_documents([str(default_text.FILES[name])]) for name in ("evaluation", "calibration")
    )
    check_disjoint(evaluation, calibration, "calibration")
    assert len(evaluation) >= 40


def test_default_text_is_named_in_an_evaluation():
    model = pico.folder("llama", num_hidden_layers=1)
    options = {"data": "default", "max_documents": 1, "window": 16, "metrics": ["bits_per_byte"]}
    assert compress.evaluate(model, **options)["settings"]["files"] == ("default",)


def test_default_text_is_named_so_in_a_resolved_recipe(monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = recipe_from_mapping(RECIPE)
    assert Path(recipe.data.calibration.files[0]).is_file()
    assert recipe.data.calibration.files != recipe.data.evaluation.files
    again = resolved(recipe)
    assert again["data"]["calibration"]["files"] == ["default"]
    assert str(ROOT) not in json.dumps(again)
    assert recipe_from_mapping(again) == recipe
    Draft202012Validator(recipe_schema()).validate(RECIPE)


def test_default_text_takes_settings_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(RECIPE))
    sets = ["data.calibration.samples=3", "data.training=default", "data.training.length=8"]
    data = load_recipe(path, sets).data
    assert (data.calibration.samples, data.training.length) == (3, 8)
    assert data.training.files == data.calibration.files


def test_default_text_is_measured_on_and_named_in_the_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {
        "calibration": {"files": ["default"], "samples": 2, "length": 16},
        "evaluation": {"files": ["default"], "max_documents": 1, "window": 16},
    }
    model, cast = str(pico.folder("bert", num_hidden_layers=1, class_name="BertModel")), {"weights": "int8"}
    report = compress.run({**RECIPE, "model": model, "data": data, "passes": [{"cast": cast}], "bootstrap": 100}).report
    assert report["data"]["evaluation"]["files"] == report["data"]["calibration"]["files"] == ["default"]
    assert str(Path(compress.__file__).parent) not in json.dumps(report)
