"""YAML ▶ a typed `Recipe`, or every mistake in it at once, each with its place. Imports no torch.

    files ▶ nodes (located YAML) ▶ load (extends, --set) ▶ validate (types, files, order) ▶ Recipe

The models are `model`, `data`, `gates`, `entries` (passes) and `metric_entries`. `overrides` reads options of the command line.
`messages`, `suggest` and `renamed` word the mistakes, `schema` makes the JSON schema for editors, `resolve` writes a recipe out
with every default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.recipe.entries import PassEntry as PassEntry
    from compress.recipe.gates import Gates as Gates
    from compress.recipe.load import load_recipe as load_recipe
    from compress.recipe.load import read_gates as read_gates
    from compress.recipe.load import read_metrics as read_metrics
    from compress.recipe.load import recipe_from_mapping as recipe_from_mapping
    from compress.recipe.metric_entries import MetricEntry as MetricEntry
    from compress.recipe.model import Recipe as Recipe
    from compress.recipe.problems import Source as Source
    from compress.recipe.problems import locate as locate
    from compress.recipe.resolve import resolved as resolved
    from compress.recipe.resolve import to_yaml as to_yaml
    from compress.recipe.schema import recipe_schema as recipe_schema

_HOME = {
    "Gates": "gates",
    "MetricEntry": "metric_entries",
    "PassEntry": "entries",
    "Recipe": "model",
    "Source": "problems",
    "load_recipe": "load",
    "locate": "problems",
    "read_gates": "load",
    "read_metrics": "load",
    "recipe_from_mapping": "load",
    "recipe_schema": "schema",
    "resolved": "resolve",
    "to_yaml": "resolve",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import what is asked for and no more."""
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
