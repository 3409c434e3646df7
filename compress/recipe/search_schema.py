"""JSON schema of values that a sweep searches: ``{search: …}`` in place of a value, ``optional`` in a pass."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from compress.recipe.space import OPTIONAL, SEARCH

#: Keys of a property that describe it and do not restrict its value.
_WORDS = ("title", "description", "default", "examples")
_NUMBERS = {"number", "integer"}
RANGE = "Range"


def add_search(definitions: dict[str, Any], properties: dict[str, Any], settings: Iterable[str]) -> None:
    """Let values be searched: ``store``, ``seed``, whole passes, and whatever passes, calibration and training are set by.

    Args:
        definitions, properties: of the schema of recipes; changed in place. settings: definitions of the passes' settings.
    """
    known: dict[str, str] = {}
    for name in settings:
        definitions[name]["properties"][OPTIONAL] = {
            "type": "boolean",
            "default": False,
            "description": "In a sweep: try the recipe with this pass, and without it.",
        }
    own = definitions["Data"]["properties"]
    sections = [own["calibration"], own["training"], *({"$ref": f"#/$defs/{name}"} for name in settings)]
    for name in referenced(definitions, sections):
        fields = definitions[name].get("properties", {})
        for key in [key for key in fields if key != OPTIONAL]:
            _searched(definitions, fields, key, f"#/$defs/{name}/properties/{key}", known)
    for fields, place, keys in ((own, "#/$defs/Data/properties", ("calibration", "training")),
                                (properties, "#/properties", ("store", "seed"))):  # fmt: skip
        for key in keys:
            _searched(definitions, fields, key, f"{place}/{key}", known)
    definitions[RANGE] = _RANGE
    one_of = [{"$ref": "#/properties/passes/items"}, {"type": "null"}]
    choices = {"type": "array", "minItems": 2, "items": {"anyOf": one_of}}
    described = {"description": "Passes of which each trial has one; null for none.", **choices}
    properties["passes"]["items"]["oneOf"].append(_mapping(SEARCH, described))


def referenced(definitions: dict[str, Any], root: Any) -> list[str]:
    """The definitions that a schema refers to, directly or not, in the order of ``definitions``."""
    names: set[str] = set()
    queue = [root]
    while queue:
        more = set(re.findall(r'"#/\$defs/([^"/]+)["/]', json.dumps(queue.pop()))) - names
        names |= more
        queue += [definitions[name] for name in more]
    return [name for name in definitions if name in names]


def _searched(definitions: dict[str, Any], fields: dict[str, Any], key: str, place: str, known: dict[str, str]) -> None:
    """Let the value of a key be searched. ``known``: what a value is restricted to ▶ definition of its search."""
    field = fields[key]
    value = {name: each for name, each in field.items() if name not in _WORDS}
    text = json.dumps(value, sort_keys=True)
    if text not in known:
        known[text] = f"Search{len(known) + 1}"
        definitions[known[text]] = _mapping(SEARCH, _search(value, place))
    ways = value["anyOf"] if list(value) == ["anyOf"] else [value]
    described = {name: each for name, each in field.items() if name in _WORDS}
    fields[key] = {**described, "anyOf": [*ways, {"$ref": f"#/$defs/{known[text]}"}]}


def _search(value: dict[str, Any], place: str) -> dict[str, Any]:
    """The schema of what is searched. ``place``: of the schema of one value."""
    choices: dict[str, Any] = {"type": "array", "minItems": 2, "items": {"$ref": place}}
    if not _takes_numbers(value):
        return {"description": "Values to try.", **choices}
    listed = _mapping("choices", {"description": "Numbers to try.", **choices})
    return {
        "description": "Values to try; two numbers are a range.",
        "anyOf": [choices, {"$ref": f"#/$defs/{RANGE}"}, listed],
    }


def _takes_numbers(value: dict[str, Any]) -> bool:
    ways = value.get("anyOf", [value])
    types = [each.get("type", ()) for each in ways]
    return any(_NUMBERS & ({kind} if isinstance(kind, str) else set(kind)) for kind in types)


def _mapping(key: str, value: dict[str, Any]) -> dict[str, Any]:
    """The schema of a mapping of one key."""
    return {"type": "object", "properties": {key: value}, "required": [key], "additionalProperties": False}


_NUMBER = {"type": ["number", "string"], "examples": ["40%", 4]}
_RANGE = {
    "type": "object",
    "description": "A range of numbers, both ends included.",
    "properties": {
        "from": {"description": "The lower end.", **_NUMBER},
        "to": {"description": "The upper end.", **_NUMBER},
        "step": {"description": "Between two values; by default any value is tried.", **_NUMBER},
        "log": {"description": "Sample by the logarithm.", "type": "boolean"},
    },
    "required": ["from", "to"],
    "additionalProperties": False,
}
