"""Recipes and settings without what is the default anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress import passes
from compress.errors import CompressError
from compress.recipe.data import Data
from compress.recipe.messages import models_in
from compress.recipe.model import Recipe
from compress.settings import defaults, percentage, shares_of

#: Keys of a recipe that are always shown, or that have a rule of their own.
_KEPT = ("model", "output", "data", "passes", "evaluate", "gates")


def brief(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe, as a report holds it, without defaults. Reading it gives the same recipe."""
    usual = defaults(Recipe)
    shown = {key: value for key, value in resolved.items() if key in _KEPT or value != usual.get(key)}
    shown["data"] = {name: _section(name, section) for name, section in resolved["data"].items()}
    shown["passes"] = [
        {name: changed(name, settings) for name, settings in entry.items()} for entry in resolved["passes"]
    ]
    return {key: value for key, value in shown.items() if value not in (None, {})}


def _section(name: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """A data set without defaults."""
    (model,) = models_in(Data.model_fields[name].annotation)
    usual = defaults(model)
    return {key: value for key, value in section.items() if key not in usual or value != usual[key]}


def changed(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a pass that differ from its defaults, shares as percentages."""
    try:
        model = passes.get(name).settings
        usual, shares = defaults(model, settings), shares_of(model)
    except (CompressError, ImportError):  # a plug-in that is not installed here
        usual, shares = {}, frozenset()
    # a switch without a default was chosen by the recipe's other settings
    unset = {k for k, v in settings.items() if v in (None, [], {}) or (isinstance(v, bool) and usual.get(k) is None)}
    shown = {k: _without_none(v) for k, v in settings.items() if k not in unset and v != usual.get(k)}
    return {k: percentage(v) if k in shares else v for k, v in shown.items()}


def _without_none(value: Any) -> Any:
    """The value without keys that are None."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value
