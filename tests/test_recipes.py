"""Every recipe that is shipped runs: on a pico model, and (slow) on the example model, whose gates it passes."""

from __future__ import annotations

import json
import shutil

import pytest

import compress
from compress import passes
from compress.checkpoint.open import open_checkpoint
from compress.exports import get
from compress.recipe import load_recipe
from compress.recipe.bound import load_bound
from compress.recipe.gates import bounds
from compress.recipe.search import load_search
from compress.sweeps.run import run_sweep
from tests import pico
from tests.conftest import ROOT
from tests.sweeps.conftest import in_process

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SWEEPS, FITS = (sorted((ROOT / "recipes" / kind).glob("*.yaml")) for kind in ("sweeps", "fits"))
#: Those that classify: they have no part that a pico model could stand for.
LABELLED = ("classifier", "distill_classifier")


def pico_sized(path):
    """One recipe of several passes is run by `make test`; other tests hold the passes of the others."""
    return pytest.param(path, id=path.stem, marks=[] if path.stem == "prune_distill_cast" else [pytest.mark.slow])


@pytest.fixture(scope="module")
def small():
    """Pico models that read the text of the examples: (language model, classifier)."""
    made = []
    for name, family, changes in (
        ("tiny-lm", "llama", {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 256, "head_dim": 16}),
        ("tiny-classifier", "bert", {"vocab_size": 1500, "class_name": "BertForSequenceClassification"}),
    ):
        labels = ("id2label", "label2id")
        config = json.loads((ROOT / "examples" / name / "config.json").read_text())
        changes |= {key: config[key] for key in labels if key in config}
        folder = pico.folder(family, with_tokenizer=False, **changes)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "examples" / name / file, folder)
        made.append(folder)
    return made


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The first thirtieth of the training text: a recipe reads all of it."""
    path = tmp_path_factory.mktemp("short") / "train.txt"
    path.write_text((ROOT / "examples/text/train.txt").read_text(encoding="utf-8")[:100_000])
    return path


def lenient(loaded):
    """Whatever a gate asks for, a model of random weights passes. What takes other processes is left out; its own tests start them."""
    limits = {"max_ratio": 2, "max_increase": "10000%", "max_drop": 100, "max": 1000, "min": 0}
    asked = loaded.gates.model_dump(exclude_none=True, exclude={"prefill", "decode", "memory"})
    gates = {
        name: [{key: limits.get(key, value) for key, value in each.items()} for each in bounds(gate)]
        for name, gate in asked.items()
        if name != "cache"
    }
    gates = {name: each if isinstance(asked[name], tuple) else each[0] for name, each in gates.items()}
    measured = [entry.name for entry in loaded.evaluate or () if entry.name not in ("latency", "throughput")]
    return [f"gates={json.dumps(gates)}", *([f"evaluate={json.dumps(measured)}"] if loaded.evaluate else [])]


def reduced(loaded, small, short):
    """A pico model, and a little of the data."""
    data, sets = loaded.data, [f"model={small['classifier' in loaded.model]}"]
    if data.evaluation.label is None:
        sets += ["data.evaluation.max_documents=2", "data.evaluation.window=64"]
    if data.calibration is not None:
        sets += ["data.calibration.samples=4", "data.calibration.length=48"]
    for key in ("training", "calibration"):
        section = getattr(data, key)
        if section is not None and str(section.files[0]).endswith("train.txt"):
            sets.append(f"data.{key}.files={json.dumps([str(short)])}")
    return sets


def need_packages(loaded):
    """Skip where a package of the recipe's exports is not installed."""
    for entry in loaded.export:
        for package in get(entry.name).packages:
            pytest.importorskip(package)


def exact(report):
    for stage in report["stages"]:
        for row in stage["passes"]:
            if row["exact"]:
                assert row["planned"] == row["actual"], row["name"]


@pytest.mark.parametrize("path", [pico_sized(path) for path in RECIPES if path.stem not in LABELLED])
def test_recipe_runs_on_a_pico_model(path, small, short, tmp_path, monkeypatch):
    """Every pass as the recipe says it; on the example model in `make test-all`."""
    monkeypatch.chdir(ROOT)
    loaded = load_recipe(path)
    need_packages(loaded)
    sets = [f"output={tmp_path / 'out'}", *lenient(loaded), *reduced(loaded, small, short)]
    assert compress.plan(path).stages  # as it is shipped
    for i, entry in enumerate(loaded.passes):
        if entry.name == "distill":
            sets += [f"passes.{i}.distill.{key}=null" for key in ("tokens", "epochs")]
            sets += [
                f"passes.{i}.distill.{key}"
                for key in ("steps=2", "batch_size=4", "validation_samples=4", "allow_noop=true")
            ]
    result = compress.run(path, sets=sets)
    assert result.verdict == "passed", result.report["gates"]
    assert [p["name"] for s in result.report["stages"] for p in s["passes"]] == [p.name for p in loaded.passes]
    exact(result.report)
    open_checkpoint(result.checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweep_runs_on_a_pico_model(path, small, short, tmp_path, monkeypatch):
    """Every trial as the recipe says it; the recipes of the front load and name what is kept."""
    monkeypatch.chdir(ROOT)
    search = load_search(path)
    sets = [f"output={tmp_path / 'out'}", *reduced(search.recipe, small, short), "sweep.proxy.max_documents=1"]
    sets.append(
        "sweep.subject_to={size: {max_ratio: 2}}"
    )  # tables are most of a pico model, and two documents decide nothing
    made = run_sweep(path, sets, runner=in_process)
    assert made["status"] == "passed"
    assert len(made["trials"]) == search.trials
    assert {trial["state"] for trial in made["trials"]} <= {"done", "pruned"}
    files = sorted((tmp_path / "out.sweep/front").glob("*.yaml"))
    assert len(files) == len(made["front"]) > 1
    for file in files:
        open_checkpoint(load_recipe(file).output)


@pytest.mark.slow
@pytest.mark.parametrize("path", FITS, ids=lambda path: path.stem)
def test_bound_is_kept_on_a_pico_model(path, small, short, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = load_bound(path).recipe
    made = compress.fit(path, sets=[f"output={tmp_path / 'out'}", *reduced(loaded, small, short)])
    assert made.run.verdict == "passed"
    assert made.run.report["result"]["size"]["bytes"] <= made.document["bound"]
    open_checkpoint(made.run.checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_on_the_example_model(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = load_recipe(path)
    need_packages(loaded)
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
    if "throughput" in loaded.metrics:
        fewer.append(f"evaluate={json.dumps([name for name in loaded.metrics if name != 'throughput'])}")
    result = compress.run(path, sets=[f"output={tmp_path / 'out'}", *fewer])
    assert result.verdict == "passed", result.report["gates"]
    exact(result.report)
    open_checkpoint(result.checkpoint)


@pytest.mark.slow
def test_classifier_recipe_fails_its_gate_at_a_harsher_setting(tmp_path, monkeypatch):
    """The one that the recipe names; at its own the gate passes, see above."""
    monkeypatch.chdir(ROOT)
    harsher = (ROOT / "recipes/classifier.yaml").read_text().partition("fails: ")[2].splitlines()[0]
    sets = [f"passes.0.prune_structured.{setting}" for setting in harsher.split()]
    assert sets
    result = compress.run("recipes/classifier.yaml", sets=[f"output={tmp_path / 'out'}", *sets])
    assert (result.verdict, result.published) == ("failed", False)
    assert [g["gate"] for g in result.report["gates"] if g["verdict"] == "fail"] == ["accuracy.max_drop"]


def test_recipes_cover_every_pass():
    used = {entry.name for path in RECIPES for entry in load_recipe(path, check_files=False).passes}
    assert used == set(passes.names())
