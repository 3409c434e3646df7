"""The list of passes in a recipe: one entry is a pass by name, with its settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from compress import passes
from compress.errors import CompressError
from compress.passes.base import PassSettings
from compress.recipe.suggest import choices


@dataclass(frozen=True)
class PassEntry:
    """One pass of a recipe; ``settings`` is an instance of the pass's own settings model."""

    name: str
    settings: PassSettings


def parse_pass(value: Any) -> PassEntry:
    """An entry from ``{name: settings}``, or from a bare name where every setting has a default.

    Raises `ValidationError` or `PydanticCustomError`; inside pydantic these get the path of the entry.
    """
    if isinstance(value, PassEntry):
        return value
    if isinstance(value, str):
        value = {value: None}
    if not isinstance(value, dict):
        raise PydanticCustomError("pass_entry", "expected a pass, as `name: {settings}`")
    if len(value) != 1:
        given = ", ".join(f"`{key}`" for key in value) or "none"
        hint = "an entry is `- name: {settings}`; settings stand below the name, indented further than it"
        raise PydanticCustomError("pass_entry", "expected one pass, got {given}", {"given": given, "hint": hint})
    name, settings = next(iter(value.items()))
    model = _settings_model(name)
    if isinstance(settings, model):
        return PassEntry(name, settings)
    if settings is not None and not isinstance(settings, dict):
        raise PydanticCustomError(
            "pass_entry",
            "{name}: expected a mapping of settings, got {value}",
            {"name": name, "value": repr(settings), "hint": f"as `{name}: {{setting: value}}`"},
        )
    # validated as JSON: strict about types, but a list serves as a tuple
    text = json.dumps({} if settings is None else settings)
    return PassEntry(name, model.model_validate_json(text, strict=True))


def _settings_model(name: str) -> type[PassSettings]:
    known = passes.names()
    if name not in known:
        hint = choices(name, known, "passes")
        raise PydanticCustomError("pass_entry", "unknown pass `{name}`", {"name": name, "hint": hint})
    try:
        return passes.get(name).settings
    except (CompressError, ImportError, AttributeError) as error:  # a plug-in that does not import
        raise PydanticCustomError(
            "pass_entry", "the pass `{name}` cannot be loaded: {error}", {"name": name, "error": str(error)}
        ) from None


RecipeEntry = Annotated[PassEntry, PlainValidator(parse_pass), WithJsonSchema({"type": ["object", "string"]})]
