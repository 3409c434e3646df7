"""`compress init` and `--preset`: a recipe that the checkpoint takes, by its headers, for every family, goal and preset."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import compress
from compress.checkpoint.open import open_checkpoint
from compress.errors import CompressError
from compress.passes.cast.schemes import SCHEMES
from compress.planning import size_on_disk
from compress.presets.begin import first_recipe, named_output
from compress.presets.drafts import GOALS, PRESETS
from compress.presets.facts import separator_of, text_at_hand
from compress.presets.fit import _ALLOWED
from compress.presets.render import SCHEMA, rendered
from compress.recipe import load_recipe
from tests import pico

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def begin(model, goal="small", preset=None, max_bytes=None):
    return first_recipe(str(model), goal, preset, max_bytes, named_output(str(model), preset or goal))


def small(fitted):
    """The recipe with data and training so short that it runs in a second."""
    mapping = json.loads(json.dumps(fitted.mapping))
    for name, section in mapping.get("data", {}).items():
        section |= {"evaluation": {"max_documents": 2, "window": 16}, "training": {"length": 16}}.get(
            name, {"samples": 4, "length": 16}
        )
    for entry in mapping["passes"]:
        if "distill" in entry:
            entry["distill"] = {"teacher": "original", "steps": 1, "batch_size": 2, "allow_noop": True}
    return {**mapping, "gates": {}, "evaluate": [m for m in mapping.get("evaluate", []) if m != "latency"] or None}


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("family", pico.families())
def test_init_writes_a_recipe_that_is_checked_and_planned(family, goal, tmp_path):
    fitted = begin(pico.folder(family), goal)
    Path("recipe.yaml").write_text(rendered(fitted, "compress init", Path()))
    assert load_recipe(Path("recipe.yaml")) == fitted.recipe
    assert fitted.plan.stages[-1].size.bytes < fitted.plan.original.bytes
    assert fitted.recipe.gates.size.max_ratio < 1


@pytest.mark.parametrize(
    ("family", "class_name", "goal"),
    [
        ("gpt2", None, "small"),
        pytest.param("llama", None, "fast", marks=pytest.mark.slow),
        pytest.param("bert", "BertModel", "accurate", marks=pytest.mark.slow),
        pytest.param("bert", None, "small", marks=pytest.mark.slow),
        pytest.param("t5", None, "small", marks=pytest.mark.slow),
        pytest.param("vit", None, "small", marks=pytest.mark.slow),
    ],
)
def test_init_writes_a_recipe_that_runs(family, class_name, goal):
    model = pico.folder(family, num_hidden_layers=2, **({"class_name": class_name} if class_name else {}))
    fitted = begin(model, goal)
    result = compress.run(small(fitted))
    assert size_on_disk(open_checkpoint(result.checkpoint)).bytes == fitted.plan.stages[-1].size.bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_preset_runs(name):
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
    fitted = begin(pico.folder("llama", num_hidden_layers=2, **sizes), preset=name)
    compress.run(small(fitted))


def test_presets_are_every_scheme_and_are_listed_in_the_docs():
    assert {*SCHEMES} < {*PRESETS}
    page = (ROOT / "docs/start.md").read_text(encoding="utf-8")
    table = page[page.index("| preset |") :].partition("\n\n")[0]
    listed = [name for line in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", line.split("|")[1])]
    assert sorted(listed) == sorted(PRESETS)


def test_init_is_small_where_tables_are_large():
    """Codes for the table take the compact store, which pays where the table is a large share."""
    sizes = {"num_hidden_layers": 3, "intermediate_size": 512, "tie_word_embeddings": True}
    usual, table = (begin(pico.folder("llama", vocab_size=v, **sizes)).mapping for v in (300, 4000))
    assert table["store"] == "compact"
    assert table["passes"][0]["cast"]["overrides"] == {"model.embed_tokens": "int8"}
    assert "store" not in usual


def test_init_keeps_a_bound_on_bytes_with_the_most_accurate_recipe():
    model = pico.folder("llama", num_hidden_layers=2)
    before = size_on_disk(open_checkpoint(model)).bytes
    formats = []
    for share in (0.6, 0.5, 0.4, 0.3):
        fitted = begin(model, max_bytes=int(share * before))
        assert fitted.plan.stages[-1].size.bytes <= fitted.mapping["gates"]["size"]["max"] == int(share * before)
        formats.append(fitted.mapping["passes"][0]["cast"]["weights"])
    assert formats == ["bf16", "int8", "int8", "int4"]


def test_init_gates_allow_more_for_fewer_bits():
    assert all([*allowed] == ["least", "little", "some", "much"] for _, allowed in _ALLOWED.values())
    bert = pico.folder("bert", class_name="BertModel")
    assert begin(bert, "accurate").mapping["gates"]["similarity"] == {"min": 0.99}
    assert begin(bert, "small").mapping["gates"]["similarity"] == {"min": 0.95}


def test_init_reads_the_text_at_hand():
    assert {*text_at_hand().values()} == {"default"}
    Path("data").mkdir()
    Path("data/train.jsonl").write_text('{"other": "a"}\n')
    Path("data/valid.txt").write_text("one\n<|doc|>\ntwo\n")
    assert {*text_at_hand().values()} == {"default"}  # no field `text`, so there is nothing to calibrate on
    Path("train.jsonl").write_text('{"text": "a"}\n')
    assert text_at_hand() == {"calibration": "train.jsonl", "evaluation": "data/valid.txt"}
    assert separator_of("data/valid.txt") == "<|doc|>"
    fitted = begin(pico.folder("llama", num_hidden_layers=1))
    assert fitted.mapping["document_separator"] == "<|doc|>"
    assert "default" not in rendered(fitted, "compress init", Path())


def test_init_names_the_schema_by_a_relative_path_in_a_clone_alone(tmp_path):
    fitted = begin(pico.folder("llama", num_hidden_layers=1))
    named = [
        rendered(fitted, "x", folder).splitlines()[0].partition("$schema=")[2]
        for folder in (ROOT / "recipes", tmp_path)
    ]
    assert named == ["../compress/recipe/recipe.schema.json", SCHEMA.as_uri()]


def test_named_output_is_not_there_yet():
    assert named_output("org/name@main", "2:4") == "name-2-4"
    Path("name-2-4").mkdir()
    assert named_output("org/name@main", "2:4") == "name-2-4-2"


def without_tokenizer(to):
    return pico.save(to / "m", "llama", num_hidden_layers=1, with_tokenizer=False)


def unknown(to, **more):
    folder = pico.save(to / "m", "llama", num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "none_such", "architectures": ["NoneSuch"], **more})
    )
    return folder


def test_init_of_a_model_without_tokenizer_reads_no_data(tmp_path):
    mapping = begin(without_tokenizer(tmp_path)).mapping
    assert "data" not in mapping
    assert mapping["passes"][0]["cast"]["method"] == "mse"


@pytest.mark.parametrize("more", [{}, {"hidden_size": 8}])
def test_init_of_an_unknown_class_casts_what_it_can(more, tmp_path):
    """Also where the config gives other shapes than the tensors have, so that no table is found."""
    mapping = begin(unknown(tmp_path, **more)).mapping
    assert mapping["passes"][0]["cast"]["weights"] == "int4"
    assert "evaluation" not in mapping.get("data", {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goal": "smal"}, "--goal: no goal is called `smal`; did you mean `small`?"),
        ({"preset": "w4a15"}, "--preset: no preset is called `w4a15`; did you mean `W4A16`?"),
        ({"preset": "2:4", "max_bytes": 5}, "--max-bytes: codes fit a bound on bytes; leave --preset and --goal fast out"),
        ({"max_bytes": 5}, "--max-bytes: codes leave "),
        ({"model": "recipe.yaml"}, "recipe.yaml: is a recipe, not a checkpoint; name the folder of a model, or a hub id"),
        ({"model": "./none"}, "none: there is no such folder"),
    ],
)  # fmt: skip
def test_init_refuses_in_one_line_with_the_cure(options, message):
    arguments = {"model": pico.folder("llama", num_hidden_layers=1), **options}
    with pytest.raises(CompressError) as caught:
        begin(**arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_preset_is_refused_where_the_checkpoint_cannot_take_it(tmp_path):
    shutil.copytree(pico.folder("t5"), tmp_path / "m")
    with pytest.raises(CompressError, match="T5ForConditionalGeneration does not take it") as caught:
        begin(tmp_path / "m", preset="recovery")
    assert "\n" not in str(caught.value)
