"""The JSON schema accepts real recipes, refuses wrong ones, and describes every key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import GOOD
from test_load import FULL

from compress import passes
from compress.recipe import load_recipe, recipe_schema, resolved
from compress.recipe.nodes import parse
from compress.recipe.problems import Origin, plain
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads(json.dumps(recipe_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def values(text: str) -> Any:
    node = parse(text, Origin("x"), [])
    assert node is not None
    return plain(node)


def test_recipe_schema_accepts_real_recipes(validator: Any, work: Path) -> None:
    for text in (FULL, GOOD, "extends: base.yaml\nseed: 2\n", GOOD + "data:\ngates:\n"):
        validator.validate(values(text))
    Path("r.yaml").write_text(FULL)
    validator.validate(resolved(load_recipe(Path("r.yaml"))))


@pytest.mark.parametrize(
    "text",
    [
        "model: m\noutput: o\n",
        GOOD + "sede: 1\n",
        GOOD + "seed: x\n",
        GOOD + "gates: {size: {}}\n",
        GOOD + "device: gpu\n",
        GOOD.replace("bf16", "bf17"),
        GOOD.replace("weights", "wieghts"),
        GOOD.replace("cast", "quantize"),
        GOOD.replace("- cast: {weights: bf16}", "- cast"),
        GOOD.replace("  - cast: {weights: bf16}", "  []"),
    ],
)
def test_recipe_schema_rejects_wrong_recipes(validator: Any, text: str) -> None:
    assert not validator.is_valid(values(text))


def test_recipe_schema_describes_every_key() -> None:
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"]
    assert schema["title"]
    bare = [key for key, value in schema["properties"].items() if not value.get("description")]
    for name, definition in schema["$defs"].items():
        bare += [
            f"{name}.{key}" for key, value in definition.get("properties", {}).items() if not value.get("description")
        ]
    assert bare == []


def test_recipe_schema_has_every_pass() -> None:
    listed = recipe_schema()["properties"]["passes"]["items"]["oneOf"]
    # what has a default for every setting may also be named alone
    entries = [entry.get("anyOf", [entry])[0] for entry in listed]
    assert [next(iter(entry["properties"])) for entry in entries] == [*passes.names(), "search"]


SWEEP = GOOD.replace("bf16", "{search: [int8, int4]}") + "sweep: {minimize: [size]}\n"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_schema_accepts_shipped_recipes(validator: Any, path: Path) -> None:
    validator.validate(values(path.read_text()))


@pytest.mark.parametrize(
    "text",
    [
        SWEEP,
        SWEEP + "seed: {search: [1, 2, 3]}\nstore: {search: [stock, compact]}\n",
        GOOD.replace("bf16", "int4, group_size: {search: {choices: [32, 64]}}"),
        GOOD.replace("bf16", "int4, bits: {search: {from: 2, to: 4, step: 0.5}}"),
        GOOD.replace("bf16", "int4, optional: true"),
        GOOD.replace("cast: {weights: bf16}", "search: [{cast: {weights: bf16}}, null]"),
        "model: m\noutput: o\nfit: {max_bytes: 200MB}\n",
    ],
)
def test_recipe_schema_accepts_values_to_search(validator: Any, text: str) -> None:
    validator.validate(values(text))


@pytest.mark.parametrize(
    "text",
    [
        SWEEP.replace("int4", "int9"),
        SWEEP.replace("search:", "serach:"),
        SWEEP.replace("minimize", "minimise"),
        SWEEP.replace("[size]", "[sise]"),
        SWEEP.replace("[int8, int4]", "{from: 2, to: 4}"),
        GOOD.replace("cast: {weights: bf16}", "search: [{quantize: {weights: int4}}, null]"),
        GOOD.replace("bf16", "int4, bits: {search: {from: 2, til: 4}}"),
        GOOD.replace("bf16", "int4, optional: maybe"),
        GOOD.replace("output: out", "output: {search: [a, b]}"),
        "model: m\noutput: o\nfit: {max_byte: 200MB}\n",
    ],
)
def test_recipe_schema_rejects_wrong_searches(validator: Any, text: str) -> None:
    assert not validator.is_valid(values(text))
