"""A tree of nodes ▶ a `Recipe`, and every mistake at its place."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from compress.data.default_text import DEFAULT
from compress.recipe.checks import (
    lacking_data,
    lengths_not_measured,
    misplaced_passes,
    missing_files,
    places_not_measured,
    tasks_not_measured,
)
from compress.recipe.messages import translate
from compress.recipe.model import Recipe
from compress.recipe.problems import ListNode, MapEntry, MapNode, Problem, Source, plain, text_of

_SECTIONS = ("data", "gates")  # a section with nothing below its key is empty


def build(root: MapNode, problems: list[Problem], *, check_files: bool, complete: bool) -> Recipe | None:
    """Build the recipe of a tree. Mistakes go to ``problems``; None comes back if the tree makes no recipe.

    Without ``complete`` a file that the recipe extends could not be read, so no key is reported as missing.
    """
    spell_default_text(root)
    values = _values(root)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate_json(json.dumps(values), strict=True)
        recipe._source = Source(root)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        problems += translate(root, [e for e in errors if complete or e["type"] != "missing" or len(e["loc"]) > 1])
    problems += misplaced_passes(root, values)
    if complete:
        problems += lacking_data(root, values)
        if recipe is not None:
            problems += [
                *lengths_not_measured(root, recipe),
                *places_not_measured(root, recipe),
                *tasks_not_measured(root, recipe),
            ]
    if check_files:
        problems += missing_files(root)
    return recipe


def spell_default_text(root: MapNode) -> None:
    """Change ``calibration: default`` in the tree to ``calibration: {files: [default]}``, and the other data sets."""
    data = root.get("data")
    for entry in data.entries.values() if isinstance(data, MapNode) else ():
        if text_of(entry.node) == DEFAULT:
            entry.node = MapNode({"files": MapEntry(ListNode([entry.node]), entry.key)}, entry.node.place)


def _values(root: MapNode) -> dict[str, Any]:
    values: dict[str, Any] = plain(root)
    for key in _SECTIONS:
        if key in values and values[key] is None:
            del values[key]
    if isinstance(gates := values.get("gates"), dict):  # `kl:` with nothing is a gate without a bound
        values["gates"] = {name: {} if gate is None else gate for name, gate in gates.items()}
    return values
