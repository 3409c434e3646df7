"""Shipped recipes are easy to edit: the schema is named, and block style alone, which editors complete."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML
from ruamel.yaml.nodes import CollectionNode, ScalarNode

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
MODELINE = "# yaml-language-server: $schema="


def in_flow_style(node):
    if isinstance(node, ScalarNode):
        return False
    assert isinstance(node, CollectionNode)
    children = [part for child in node.value for part in (child if isinstance(child, tuple) else (child,))]
    return bool(node.flow_style) or any(in_flow_style(child) for child in children)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_names_its_schema_and_says_what_it_does(path):
    modeline, comment, *_ = path.read_text(encoding="utf-8").splitlines()
    assert modeline.startswith(MODELINE)
    assert (path.parent / modeline.removeprefix(MODELINE)).samefile(ROOT / "compress/recipe/recipe.schema.json")
    assert comment.startswith("# ")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_is_in_block_style(path):
    assert not in_flow_style(YAML(typ="safe", pure=True).compose(path.read_text(encoding="utf-8")))
