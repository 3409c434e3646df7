from __future__ import annotations

import json
import os

import pytest
import torch

from compress import passes
from compress.blockwise import rates as blockwise_rates
from compress.blockwise.rates import _fitted
from compress.checkpoint.open import open_headers
from compress.passes.work import DataSizes, SampleSize
from compress.pipeline.forecast import Forecast
from compress.planning import make_plan
from compress.progress import SilentProgress
from compress.recipe import recipe_from_mapping
from compress.recipe.sizes import text_tokens
from compress.work import _ROUGH, TERMS, Rates, Work, cached_rates, keep_rates, minutes_text, terms
from tests import pico

ROUGH = Rates(_ROUGH)


def test_predict_sums_terms_times_rates():
    work = Work()
    work.add("gptq", 8, 4, 3)
    work.add("gptq", 8, 4, 2)
    work.add("disk", 0, 1, 100)
    seconds = {kind: tuple(0.0 for _ in several) for kind, several in TERMS.items()}
    rates = Rates(seconds | {"gptq": (1.0, 10.0, 100.0), "disk": (0.5,)})
    assert rates.predict(work) == 5 * (4 + 10 * 32 + 100 * 128) + 50
    assert list(rates.by_kind(work)) == ["gptq", "disk"]


def test_fitted_rates_are_those_that_made_the_times():
    rates = (2e-5, 0.0, 3e-11)
    sizes = [(256, 256), (1024, 256), (256, 768), (768, 768)]
    rows = [(o, i, sum(r * t for r, t in zip(rates, terms("gptq", o, i), strict=True))) for o, i in sizes]
    assert _fitted("gptq", rows) == pytest.approx(rates, rel=1e-6, abs=1e-14)


def test_rates_are_cached_by_machine_and_damaged_ones_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cached_rates() is None
    keep_rates(ROUGH)
    assert cached_rates() == ROUGH
    monkeypatch.setenv("OMP_NUM_THREADS", "63")
    assert cached_rates() is None
    monkeypatch.delenv("OMP_NUM_THREADS")
    [file] = (tmp_path / "compress").iterdir()
    file.write_text(json.dumps({"schema": "rates", "data": {}}))
    assert cached_rates() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # not a folder
    keep_rates(ROUGH)
    assert cached_rates() is None


@pytest.mark.parametrize(
    ("threads", "others", "measured", "kept"),
    [
        (2, [0, 0, 0, 0], 2, True),
        (2, [0, 1e6, 0, 0], 1, False),  # found busy before
        (2, [0, 0, 0, 1e6], 2, False),  # and only while measuring
        (1, [0, 1e6], 1, True),
    ],
)
def test_rates_that_other_processes_falsify_are_not_kept(tmp_path, monkeypatch, threads, others, measured, kept):
    used = [threads]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(blockwise_rates, "_others_seconds", iter(others).__next__)

    def measure(progress):
        assert used[-1] == measured
        return ROUGH

    monkeypatch.setattr(blockwise_rates, "measure_rates", measure)
    assert blockwise_rates.kept_rates(SilentProgress()) == ROUGH
    assert used[-1] == threads
    assert cached_rates() == (ROUGH if kept else None)


def test_seconds_of_other_processes_are_of_the_cores_of_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(blockwise_rates, "_own_cores", lambda: {1})
    ticks = os.sysconf("SC_CLK_TCK")
    stat = tmp_path / "stat"
    stat.write_text(f"cpu 9 9 9 9\ncpu0 {7 * ticks} 0 0 5\ncpu1 {3000 * ticks} {20 * ticks} {ticks} 5\nintr 1\n")
    own = sum(os.times()[:4])
    assert 3021 - own - 5 < blockwise_rates._others_seconds(stat) <= 3021 - own
    assert blockwise_rates._others_seconds(tmp_path / "none") == 0


def _work(name, folder, tokens, **settings):
    instance = passes.get(name)
    return instance.work(open_headers(folder)[0], instance.settings(**settings), DataSizes(SampleSize(tokens, 16)))


def test_work_counts_the_products_and_hessians_of_a_llama():
    folder = pico.folder("llama")
    spec = open_headers(folder)[0]
    plain = {"method": "sparsegpt", "sparsity": 0.5, "reconstruction_epochs": 0}
    work = _work("prune_unstructured", folder, 8, **plain)
    matrices = sum(t.count for n, t in spec.tensors.items() if ".layers." in n and len(t.shape) == 2)
    rows = {key: times for key, times in work.times.items() if key[0] == "product"}
    assert (
        sum(o * i * times for (_, o, i), times in rows.items()) == matrices * (8 + 2) * 16
    )  # once, and the self-check
    depth, hidden = spec.structure.config["num_hidden_layers"], spec.structure.config["hidden_size"]
    inner = spec.structure.config["intermediate_size"]
    hessians = {i: times for (kind, _, i), times in work.times.items() if kind == "hessian"}
    assert hessians[inner] == depth * 8 * 16
    assert hessians[hidden] == 3 * depth * 8 * 16  # q, k, v; o; gate, up
    tuned = _work("prune_unstructured", folder, 8, **plain | {"reconstruction_epochs": 5})
    products = sum(o * i * times for (kind, o, i), times in tuned.times.items() if kind == "product")
    # statistics, targets, outputs; the self-check; one sample held out, before and after; 5 epochs, backwards twice
    assert products == matrices * (3 * 8 + 2 + 2 * 1 + 5 * 3 * 7) * 16


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_work_grows_with_samples_and_corrections(family):
    folder = pico.folder(family)
    alone = {"weights": "int4", "error_correction": [], "reconstruction_epochs": 0, "group_size": "channel"}
    few, many = (ROUGH.predict(_work("cast", folder, n, **alone)) for n in (8, 64))
    assert few < many
    assert ROUGH.predict(_work("cast", folder, 64, weights="int4", group_size="channel")) > many
    assert passes.get("cast").work(open_headers(folder)[0], passes.get("cast").settings(**alone), DataSizes()) is None


def test_work_of_training_counts_passes_of_student_and_teacher():
    """Forward and two products backward of the student, forward of the teacher, and of both for each look at held-out text."""
    folder, sizes = pico.folder("llama"), DataSizes(training=SampleSize(100, 16))
    spec = open_headers(folder)[0]
    instance = passes.get("distill")
    settings = instance.settings(steps=6, batch_size=4, validation_samples=8, evaluate_every=3)
    work = instance.work(spec, settings, sizes)
    matrices = sum(t.count for n, t in spec.tensors.items() if ".layers." in n and len(t.shape) == 2)
    head = spec.structure.config["vocab_size"] * spec.structure.config["hidden_size"]
    products = sum(o * i * times for (kind, o, i), times in work.times.items() if kind == "product")
    assert products == (matrices + head) * 16 * (6 * 4 * (3 + 1) + 3 * 8 * 2)
    assert sum(times for (kind, *_), times in work.times.items() if kind == "adamw") == 6 * spec.parameters
    other = instance.settings(steps=6, teacher="elsewhere/teacher")
    assert instance.work(spec, other, sizes) is None


@pytest.mark.parametrize(
    ("name", "less", "more"),
    [
        ("prune_structured", {"layers": 1, "compensation": "none"}, {"layers": 2}),
        ("prune_structured", {"mlp": "25%", "compensation": "least_squares"}, {"mlp": "25%", "heads": 2}),
        ("factorize", {"rank": 4, "reconstruction_epochs": 0}, {"keep_parameters": "60%"}),
        ("share", {"groups": [[0, 1]], "residual_rank": 2}, {"groups": 2, "residual_rank": 2}),
    ],
)
def test_work_of_other_passes_grows_with_what_they_do(name, less, more):
    folder = pico.folder("llama")
    few, many = (ROUGH.predict(_work(name, folder, 32, **settings)) for settings in (less, more))
    assert 0 < few < many


def test_plan_tells_the_time_of_evaluation(tmp_path):
    """The original reads the text once alone and once beside each stage, which reads it too."""
    (tmp_path / "text.txt").write_text("some words " * 600)
    recipe = recipe_from_mapping(
        {
            "model": str(pico.folder("llama")),
            "output": str(tmp_path / "out"),
            "data": {"evaluation": {"files": [str(tmp_path / "text.txt")], "window": 64}},
            "passes": [{"prune_unstructured": {"sparsity": 0.5, "method": "magnitude"}}, {"cast": {"weights": "bf16"}}],
            "evaluate": ["bits_per_byte"],
        }
    )
    spec = open_headers(pico.folder("llama"))[0]
    plan = make_plan(recipe, spec)
    tokens = text_tokens(6600, spec)
    head = spec.structure.config["vocab_size"] * spec.structure.config["hidden_size"]
    rows = plan.beside.evaluation.times[
        "product", spec.structure.config["vocab_size"], spec.structure.config["hidden_size"]
    ]
    assert rows == pytest.approx(5 * tokens, rel=0.05)
    assert plan.to_dict(ROUGH)["seconds"]["evaluation"] > 5 * tokens * head * 1e-11
    assert plan.to_dict()["seconds"] == {"preparation": None, "evaluation": None}


def test_minutes_are_readable():
    assert [minutes_text(s) for s in (None, 0.2, 61, 95, 840, 7800)] == [
        "–",
        "1 s",
        "61 s",
        "2 min",
        "14 min",
        "2 h 10 min",
    ]


class _Heard(SilentProgress):
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)

    def task(self, title, total=None, unit="tensors"):
        return self

    def advance(self, steps=1, note=""):
        self.lines.append(note)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_forecast_follows_what_stages_and_blocks_take():
    now, heard = [0.0], _Heard()
    forecast = Forecast(heard, {1: 600.0, 2: 1200.0, 3: None, 4: 60.0}, lambda: now[0])
    forecast.stage(1, 3, "cast")
    with forecast.task("casting", 10, "blocks") as task:
        for number in range(2):
            now[0] += 120.0  # twice the prediction
            task.advance(note=f"block {number}")
    now[0] = 1200.0
    forecast.stage(2, 3, "prune")
    now[0] += 61.0
    with forecast.task("write", 3) as task:
        task.advance()
    forecast.stage(3, 3, "other")
    with forecast.task("write", 3) as task:
        task.advance(note="x")
    forecast.evaluation(3)
    with forecast.task("evaluate", 3, "windows") as task:
        task.advance(note="a.txt")
        now[0] += 30
        task.advance()
    assert heard.lines == [
        "about 10 min, more than 31 min to the end of the run",
        "more than 29 min to the end · block 0",
        "more than 37 min to the end · block 1",
        "about 40 min, more than 42 min to the end of the run",
        "more than 41 min to the end",
        "x",
        "about 42 s",
        "42 s to the end · a.txt",
        "12 s to the end · a.txt",
    ]


def test_rough_rates_have_every_kind_and_term():
    assert _ROUGH.keys() == TERMS.keys()
    assert {k: len(v) for k, v in _ROUGH.items()} == {k: len(v) for k, v in TERMS.items()}
