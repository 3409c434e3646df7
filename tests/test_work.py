from __future__ import annotations

import json

import pytest

from compress import passes
from compress.blockwise.rates import _fitted
from compress.checkpoint.open import open_headers
from compress.passes.work import CalibrationSize
from compress.pipeline.forecast import Forecast
from compress.progress import SilentProgress
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


def _work(name, folder, tokens, **settings):
    instance = passes.get(name)
    return instance.work(open_headers(folder)[0], instance.settings(**settings), CalibrationSize(tokens, 16))


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
    assert passes.get("cast").work(open_headers(folder)[0], passes.get("cast").settings(**alone), None) is None


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


def test_forecast_follows_what_stages_and_blocks_take():
    now, heard = [0.0], _Heard()
    forecast = Forecast(heard, {1: 600.0, 2: 1200.0, 3: None}, lambda: now[0])
    forecast.stage(1, 3, "cast")
    with forecast.task("casting", 10, "blocks") as task:
        for _ in range(2):
            now[0] += 120.0  # twice the prediction
            task.advance(note="block")
    now[0] = 1200.0
    forecast.stage(2, 3, "prune")
    now[0] += 61.0
    with forecast.task("write", 3) as task:
        task.advance()
    forecast.stage(3, 3, "other")
    assert heard.lines == [
        "about 10 min, 30 min for all stages, without those whose time is not known",
        "about 28 min left of the stages, without those whose time is not known",
        "about 36 min left of the stages, without those whose time is not known",
        "about 40 min, 40 min for all stages, without those whose time is not known",
        "about 39 min left of the stages, without those whose time is not known",
    ]


def test_rough_rates_have_every_kind_and_term():
    assert _ROUGH.keys() == TERMS.keys()
    assert {k: len(v) for k, v in _ROUGH.items()} == {k: len(v) for k, v in TERMS.items()}
