"""The list of exports in a recipe: one entry is a target by name, or with settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from compress import exports
from compress.recipe.suggest import choices
from compress.settings import Settings, distinct


@dataclass(frozen=True)
class ExportEntry:
    """One export; ``settings`` is an instance of the target's model."""

    name: str
    settings: Settings

    @property
    def plain(self) -> bool:
        """Whether every setting has its default, so that the bare name says the same."""
        return self.settings == type(self.settings)()


def parse_export(value: Any) -> ExportEntry:
    """An entry from a name, or from ``{name: settings}``.

    Raises `ValidationError` or `PydanticCustomError`; inside pydantic these get the path of the entry.
    """
    if isinstance(value, ExportEntry):
        return value
    if isinstance(value, str):
        value = {value: None}
    if not isinstance(value, dict) or len(value) != 1:
        raise PydanticCustomError("export_entry", "expected a target, as `name` or `name: {settings}`")
    name, settings = next(iter(value.items()))
    if name not in exports.TARGETS:
        hint = choices(name, tuple(exports.TARGETS), "export") or ""
        raise PydanticCustomError("export_entry", "unknown target `{name}`", {"name": name, "hint": hint})
    model = exports.get(name).settings
    if settings is not None and not isinstance(settings, dict):
        raise PydanticCustomError(
            "export_entry",
            "{name}: expected a mapping of settings, got {value}",
            {"name": name, "value": repr(settings)},
        )
    # validated as JSON: strict about types, but a list serves as a tuple
    return ExportEntry(name, model.model_validate_json(json.dumps(settings or {}), strict=True))


def _distinct(entries: tuple[ExportEntry, ...]) -> tuple[ExportEntry, ...]:
    distinct(tuple(entry.name for entry in entries))
    return entries


RecipeExport = Annotated[ExportEntry, PlainValidator(parse_export), WithJsonSchema({"type": ["object", "string"]})]
RecipeExports = Annotated[tuple[RecipeExport, ...], AfterValidator(_distinct)]
