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
    assert [next(iter(entry["properties"])) for entry in entries] == passes.names()
