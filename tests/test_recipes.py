"""Every recipe that is shipped runs on the example model and passes its gates."""

from __future__ import annotations

import pytest

import compress
from compress import passes
from compress.checkpoint.open import open_checkpoint
from compress.recipe import load_recipe
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = load_recipe(path)
    data = loaded.data
    fewer = ["data.evaluation.max_documents=10"] if data.evaluation and data.evaluation.label is None else []
    if data.calibration is not None:
        fewer.append("data.calibration.samples=8")
    # a little training: that it runs as written is for the reader of the recipe to see
    fewer += [
        f"passes.{i}.distill.tokens=20000"
        for i, p in enumerate(loaded.passes)
        if p.name == "distill" and p.settings.tokens
    ]
    # speed is for benchmarks: here other tests run beside it
    fewer += [
        f"gates.{n}.max_ratio=10" for n in ("prefill", "decode", "memory") if getattr(loaded.gates, n) is not None
    ]
    result = compress.run(path, sets=[f"output={tmp_path / 'out'}", *fewer])
    assert result.verdict == "passed", result.report["gates"]
    for stage in result.report["stages"]:
        for row in stage["passes"]:
            if row["exact"]:
                assert row["planned"] == row["actual"], row["name"]
    open_checkpoint(result.checkpoint)


def test_the_classifier_fails_its_gate_at_a_harsher_setting(tmp_path, monkeypatch):
    """The one that the recipe names; at its own the gate passes, see above."""
    monkeypatch.chdir(ROOT)
    harsher = (ROOT / "recipes/classifier.yaml").read_text().partition("fails: ")[2].splitlines()[0]
    sets = [f"passes.0.prune_structured.{setting}" for setting in harsher.split()]
    assert sets
    result = compress.run("recipes/classifier.yaml", sets=[f"output={tmp_path / 'out'}", *sets])
    assert (result.verdict, result.published) == ("failed", False)
    assert [g["gate"] for g in result.report["gates"] if g["verdict"] == "fail"] == ["accuracy.max_drop"]


def test_every_pass_has_a_recipe():
    used = {entry.name for path in RECIPES for entry in load_recipe(path, check_files=False).passes}
    assert used == set(passes.names())
