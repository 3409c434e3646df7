"""Data sets of the hub: rows become a file once; what is missing, or cannot be read, is one line with the cure."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

import compress
from compress.data import hub
from compress.data.hub import kept_rows
from compress.errors import CompressError, DataError, RecipeError
from compress.recipe import recipe_from_mapping, resolved
from tests import pico

ROWS = [
    {"text": f"row {i} has some words", "messages": [{"role": "user", "content": f"{i}"}], "label": i % 2}
    for i in range(40)
]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The calls of `load_dataset`, which stands for that of the package."""
    calls = []

    def load_dataset(path, name, *, split, streaming, revision):
        calls.append((path, name, split, revision))
        if split == "gone":
            raise ValueError('Bad split: gone. Available splits: ["train", "test"]')
        return iter(ROWS[20:] if split == "test" else ROWS[:20])

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, __spec__=object()))
    monkeypatch.setattr(hub, "find_spec", lambda name: object())
    return calls


def test_rows_are_downloaded_once_and_those_asked_for(asked):
    path = kept_rows("org/name@main", "small", "train", 3, ["text", "label"])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"text": row["text"], "label": row["label"]} for row in ROWS[:3]
    ]
    assert kept_rows("org/name@main", "small", "train", 3, ["text", "label"]) == path
    assert asked == [("org/name", "small", "train", "main")]
    assert kept_rows("org/name@main", "small", "train", 3, ["text", "label"], offline=True) == path
    assert kept_rows("org/name", "small", "train", 4, ["messages"]) != path


def mapping(**data):
    model = str(pico.folder("llama", num_hidden_layers=1))
    return {
        "model": model,
        "output": f"{model}-out",
        "data": data,
        "passes": [{"cast": {"weights": "int8"}}],
        "bootstrap": 100,
    }


def test_run_reads_data_sets_of_the_hub_and_names_them(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = mapping(
        calibration={"dataset": "org/name", "samples": 2, "length": 16},
        evaluation={"dataset": "org/name", "split": "test", "rows": 2, "window": 16},
    )
    report = compress.run(made).report
    assert report["data"]["calibration"]["files"] == ["org/name:train"]
    assert report["data"]["evaluation"]["files"] == ["org/name:test"]
    assert [call[2] for call in asked] == ["train", "test"]
    assert str(tmp_path / "cache") not in json.dumps(report)


def test_recipe_with_a_data_set_resolves_to_itself(asked):
    recipe = recipe_from_mapping(mapping(calibration={"dataset": "org/name", "subset": "a"}))
    assert resolved(recipe)["data"]["calibration"]["dataset"] == "org/name"
    assert recipe_from_mapping(resolved(recipe)) == recipe
    assert (recipe.data.calibration.samples, recipe.data.calibration.length) == (128, 256)
    assert asked == []  # a recipe is read without network


def test_check_downloads_nothing_and_refuses_rows_that_are_evaluated(asked):
    section = {"dataset": "org/name", "length": 16}
    assert compress.check(mapping(calibration=section)).recipe
    with pytest.raises(CompressError, match=r"reads the rows that data\.evaluation reads: org/name, train"):
        compress.check(mapping(calibration=section, evaluation={"dataset": "org/name", "window": 16}))
    assert asked == []


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("org/name", None, "train", 3, ["body"]), {}, "org/name: has no column `body`; there are: text, messages, label"),
        (("org/name", None, "gone", 3, ["text"]), {}, "org/name: cannot be read from the hub (ValueError: Bad split: gone. Available"),
        (("org/other", None, "train", 3, ["text"]), {"offline": True}, "org/other: is not in the local cache; run once without --offline"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_had_are_one_line(asked, arguments, options, message):
    with pytest.raises(DataError) as caught:
        kept_rows(*arguments, **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_missing_package_is_refused_before_any_work(asked, monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(CompressError, match=r"need the package datasets; pip install 'compress-toolkit\[hub\]'"):
        compress.check(mapping(calibration={"dataset": "org/name", "length": 16}))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"dataset": "org/name", "files": ["default"]}, "give one of `files`, `images` and `dataset`"),
        ({"files": ["default"], "split": "test"}, "`split` goes with `dataset`"),
        ({"files": ["Salesforce/wikitext"]}, "for a data set of the hub write `dataset: Salesforce/wikitext`"),
    ],
)
def test_recipe_refuses_wrong_keys_of_a_data_set(asked, section, message):
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping(mapping(calibration=section))
    assert message in str(caught.value)
