"""JSON schema of recipes for editors, from the models that validate them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema

from compress import exports, passes
from compress.data.default_text import DEFAULT
from compress.recipe.metric_entries import SETTINGS
from compress.recipe.model import Recipe
from compress.recipe.search_schema import add_search, referenced

DIALECT = "https://json-schema.org/draft/2020-12/schema"
ID = "urn:compress-toolkit:recipe"


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe, with the settings of every pass that is installed."""
    settings: dict[str, type[BaseModel]] = {name: passes.get(name).settings for name in passes.names()}
    targets = [exports.get(name).settings for name in exports.TARGETS]
    models: list[type[BaseModel]] = [Recipe, *dict.fromkeys([*settings.values(), *SETTINGS.values(), *targets])]
    of_model, rest = models_json_schema([(model, "validation") for model in models])
    definitions: dict[str, Any] = rest["$defs"]
    recipe = definitions.pop(_defined(of_model, Recipe))
    properties: dict[str, Any] = {
        "extends": {
            "type": "string",
            "description": "Recipe to start from, relative to this file; mappings merge, lists are replaced.",
        },
        **recipe["properties"],
    }
    for section in ("data", "gates"):  # a key without a value is an empty section
        property_ = properties[section]
        properties[section] = {
            "anyOf": [{"$ref": property_["$ref"]}, {"type": "null"}],
            **{key: value for key, value in property_.items() if key != "$ref"},
        }
    for property_ in definitions["Data"]["properties"].values():
        property_["anyOf"].insert(1, {"const": DEFAULT, "description": "The text that comes with the package."})
    entries = [_entry(name, model, of_model[(model, "validation")]) for name, model in settings.items()]
    properties["passes"]["items"] = {"oneOf": entries}
    measured = properties["evaluate"]["anyOf"][0]
    measured["items"] = {
        "oneOf": [
            measured["items"],
            *(
                {
                    "type": "object",
                    "description": model.__doc__,
                    "properties": {name: {"anyOf": [of_model[(model, "validation")], {"type": "null"}]}},
                    "required": [name],
                    "additionalProperties": False,
                }
                for name, model in SETTINGS.items()
            ),
        ]
    }
    properties["export"]["items"] = {"oneOf": [_target(name, of_model) for name in exports.TARGETS]}
    add_search(definitions, properties, [_defined(of_model, model) for model in settings.values()])
    for gate in [name for name in definitions if name.endswith("Gate")]:
        definitions[gate]["minProperties"] = 1
    needed = recipe["required"]
    return {
        "$schema": DIALECT,
        "$id": ID,
        "title": "Recipe of compress",
        "description": recipe["description"],
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "anyOf": [{"required": ["extends"]}, {"required": needed}, {"required": [*needed[:-1], "fit"]}],
        "$defs": {name: definitions[name] for name in referenced(definitions, properties)},
    }


def _defined(of_model: Any, model: type[BaseModel]) -> str:
    """Name of a model's definition."""
    name: str = of_model[(model, "validation")]["$ref"]
    return name.removeprefix("#/$defs/")


def _entry(name: str, model: type[BaseModel], reference: dict[str, Any]) -> dict[str, Any]:
    """The schema of ``{name: settings}``. If every setting has a default, also of the bare name and of an empty value."""
    try:
        model()
        bare = True
    except ValidationError:
        bare = False
    return _alternatives(name, passes.get(name).summary, reference, bare=bare)


def _target(name: str, of_model: Any) -> dict[str, Any]:
    """The schema of an export."""
    target = exports.get(name)
    return _alternatives(name, target.summary, of_model[(target.settings, "validation")], bare=True)


def _alternatives(name: str, summary: str, reference: dict[str, Any], *, bare: bool) -> dict[str, Any]:
    """The schema of ``{name: settings}``; ``bare``: also of the bare name and of an empty value."""
    settings = {"anyOf": [reference, {"type": "null"}]} if bare else reference
    entry = {
        "type": "object",
        "description": summary,
        "properties": {name: {"description": summary, **settings}},
        "required": [name],
        "additionalProperties": False,
    }
    return {"anyOf": [entry, {"const": name, "description": summary}]} if bare else entry
