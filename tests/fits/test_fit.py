"""A whole search on a pico model: the bound is kept, a stopped search goes on, and mistakes are named before any work."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

import compress
from compress.cli.commands import recipes as commands
from compress.errors import CompressError, RecipeError
from compress.fits.rank import combinations
from compress.progress import SilentProgress
from tests import pico


@pytest.fixture
def recipe(tmp_path, texts):
    """A recipe with a bound, as a mapping."""
    train, valid = texts
    folder = pico.folder("llama", hidden_size=64, head_dim=16, intermediate_size=128)
    return {
        "model": str(folder),
        "output": str(tmp_path / "out"),
        "store": "compact",
        "document_separator": "<|doc|>",
        "data": {
            "calibration": {"files": [str(train)], "samples": 12, "length": 32},
            "evaluation": {"files": [str(valid)], "window": 32, "max_documents": 4},
        },
        "fit": {"max_ratio": "45%", "families": ["width", "embeddings"], "finalists": 2, "effort": "fast"},
    }


def changed(recipe, **changes):
    return {**recipe, "fit": {k: v for k, v in {**recipe["fit"], **changes}.items() if v is not None}}


@pytest.mark.slow
def test_a_search_keeps_its_bound_and_its_recipe_runs(recipe, tmp_path):
    made = compress.fit(recipe)
    document = made.document
    size = made.run.report["result"]["size"]["bytes"]
    assert size <= document["bound"] == int(0.45 * document["original"])
    assert size == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    measured = [one["measured"] for one in document["finalists"]]
    assert measured == sorted(measured)
    assert document["chosen"] == document["finalists"][0]["choice"] | {"bits": document["finalists"][0]["bits"]}
    assert [row["family"] for row in document["paid"]] == [*document["finalists"][0]["choice"], "bits"]
    assert [stage["reused"] for stage in made.run.report["stages"]] == [True]  # the best finalist is the result
    assert size == document["finalists"][0]["bytes"]
    assert not (tmp_path / "out.fit" / "finished").exists()
    assert compress.run(made.recipe).nothing_to_do
    again = compress.fit(recipe, only_search=True).document
    assert (again["trials"], again["chosen"]) == (0, document["chosen"])
    smaller = compress.fit(changed(recipe, max_ratio="35%"), only_search=True).document
    assert 0 < smaller["trials"] < document["trials"]  # bits and amounts are measured already


@pytest.mark.slow
def test_a_killed_search_goes_on(recipe, tmp_path):
    file = tmp_path / "fit.yaml"
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "compress", "fit", str(file), "--only-search", "--json", "--quiet"]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    trials = tmp_path / "out.fit" / "trials"
    while len(list(trials.glob("*.json"))) < 2:
        time.sleep(0.2)
        assert started.poll() is None
    started.send_signal(signal.SIGKILL)
    started.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in trials.glob("*.json")}
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {name: (trials / name).stat().st_mtime_ns for name in kept} == kept
    document = json.loads(done.stdout)
    assert document["trials"] == len(list(trials.glob("*.json"))) - len(kept)
    whole = compress.fit({**recipe, "output": str(tmp_path / "other")}, only_search=True).document
    for key in ("bits", "families", "chosen", "left_out"):
        assert document[key] == whole[key], key
    assert not list((tmp_path / "out.fit" / "work").glob("*"))


@pytest.mark.slow
def test_what_is_chosen_is_the_best_of_all_combinations(recipe, tmp_path):
    """Every combination of the measured amounts, tried whole: none has less divergence than the finalists' best."""
    asked = changed(recipe, finalists=16, families=["width"])
    document = compress.fit(asked, only_search=True).document
    costs = {family: dict(rows) for family, rows in document["families"].items()}
    tried = {json.dumps(one["choice"], sort_keys=True): one["measured"] for one in document["finalists"]}
    possible = {json.dumps(one["choice"], sort_keys=True) for one in document["ranked"]}
    assert possible <= {json.dumps(c, sort_keys=True) for c in combinations(costs)}
    assert set(tried) == possible
    assert min(tried.values()) == document["finalists"][0]["measured"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_ratio": None}, "give one of `max_bytes` and `max_ratio`"),
        ({"max_bytes": "1MB"}, "give one of `max_bytes` and `max_ratio`"),
        ({"families": ["heads"]}, "expected depth, width, kv_heads, sharing, sparsity, embeddings or trellis"),
        ({"max_ratio": None, "max_bytes": "900MB"}, "no more than the bound of 900 MB"),
        ({"max_ratio": "0.1%"}, r"no combination keeps .* is the least that the families reach together"),
        ({"tokens": 1000}, "`tokens` trains on text"),
    ],
)
def test_mistakes_are_named_before_any_trial(recipe, changes, message, tmp_path):
    with pytest.raises(CompressError, match=message):
        compress.fit(changed(recipe, **changes))
    assert not (tmp_path / "out.fit" / "trials").exists()


def test_a_bound_and_passes_exclude_each_other(recipe):
    with pytest.raises(RecipeError, match="`fit` finds the passes"):
        compress.fit({**recipe, "passes": [{"cast": {"weights": "int4"}}]})
    with pytest.raises(RecipeError, match="run it with `compress fit`"):
        compress.run(recipe)
    with pytest.raises(RecipeError, match="no section `fit`"):
        compress.fit({k: v for k, v in recipe.items() if k != "fit"})


def test_an_encoder_has_no_next_token(recipe):
    with pytest.raises(CompressError, match="is no causal language model"):
        compress.fit({**recipe, "model": str(pico.folder("bert"))})


def test_check_takes_a_bound(recipe, tmp_path, capsys):
    file = tmp_path / "fit.yaml"
    file.write_text(yaml.safe_dump(recipe))
    commands.check([file], [], data=False, resolved=False, json=False, form=None)
    assert "no mistakes found" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="give one of"):
        commands.check([file], ["fit.max_bytes=1MB"], data=False, resolved=False, json=False, form=None)


def test_evaluation_on_calibration_text_is_named_before_any_trial(recipe, tmp_path, texts):
    (copy := tmp_path / "copy.txt").write_text(texts[0].read_text() + "<|doc|>One document that is not there.")
    recipe["data"]["evaluation"]["files"] = [str(copy)]
    with pytest.raises(CompressError, match="evaluate on data that no pass has seen"):
        compress.fit(recipe)
    assert not (tmp_path / "out.fit").exists()


@pytest.mark.slow
def test_minutes_are_told_before_the_search_and_those_that_are_done_are_not(recipe, tmp_path):
    """No more trials than it says; the page shows every finalist and the recipe."""
    words: list[str] = []
    told = compress.fit(recipe, only_search=True, progress=_Heard(words))
    few, many = _trials_told(words)
    assert few < many
    assert told.document["trials"] <= many
    words.clear()
    compress.fit(recipe, only_search=True, progress=_Heard(words))
    fewer, less = _trials_told(words)
    assert fewer < few
    assert less < many
    page = (tmp_path / "out.fit" / "fit.html").read_text()
    assert told.document["text"] in page
    assert all(f"{one['measured']:.4f}" in page for one in told.document["finalists"])
    assert "<svg" in page
    assert "max_bytes" in page


def _trials_told(words):
    """The fewest and the most trials that the search said."""
    times = next(line for line in words if " trials" in line and " to " in line)
    return (int(part) for part in re.search(r"(\d+) to (\d+) trials", times).groups())


class _Heard(SilentProgress):
    """Progress that keeps its lines."""

    def __init__(self, words):
        self.words = words

    def message(self, text):
        self.words.append(text)
