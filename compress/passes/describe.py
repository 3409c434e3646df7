"""Passes and settings as data, for ``compress passes`` and the docs."""

from __future__ import annotations

import inspect
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from compress import passes
from compress.passes.effort import USUAL
from compress.settings import as_written

#: Settings that many passes have.
_USUAL = frozenset({"only", "skip", "allow_noop"})


def describe_all() -> dict[str, Any]:
    """All passes, in the schema ``compress.passes/1``."""
    return {"schema": "compress.passes/1", "passes": [describe(name) for name in passes.names()]}


def describe(name: str) -> dict[str, Any]:
    """One pass: description, sample recipe, sources, and each setting with type, default and description."""
    instance = passes.get(name)
    details, sample = _docstring(type(instance))
    return {
        "name": name,
        "summary": instance.summary,
        "details": details,
        "sample": sample,
        "mode": instance.mode,
        "needs": sorted(instance.needs),
        "accepts": sorted(instance.accepts),
        "yields": sorted(instance.yields),
        "source": instance.source,
        "settings": _with_sections(_usual_last(describe_settings(instance.settings)), instance.settings),
    }


def _usual_last(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of settings; those that many passes have, such as ``only``, after the pass's own."""
    return sorted(rows, key=lambda row: row["name"] in _USUAL)


def _docstring(pass_class: type) -> tuple[str, str]:
    """Return the prose of a pass's docstring on one line, and the sample recipe after ``Sample recipe::``, or ""."""
    prose, _, sample = inspect.cleandoc(pass_class.__doc__ or "").partition("Sample recipe::")
    return " ".join(prose.split()), inspect.cleandoc(sample)


def _with_sections(rows: list[dict[str, Any]], model: type[BaseModel]) -> list[dict[str, Any]]:
    """Rows of settings; after each section its keys by dotted names."""
    result = []
    for row in rows:
        result.append(row)
        for section in _models_in(model.model_fields[row["name"]].annotation) if row["type"] == "section" else ():
            result += [{**inner, "name": f"{row['name']}.{inner['name']}"} for inner in describe_settings(section)]
    return result


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def describe_settings(model: type[BaseModel]) -> list[dict[str, Any]]:
    """Name, type in words, default and description of every field of a settings model."""
    schema, efforts = model.model_json_schema(), getattr(model, "efforts", None)
    usual = {} if efforts is None else efforts.table[USUAL]
    return [_setting(key, field, schema, usual.get(key)) for key, field in model.model_fields.items()]


def _setting(key: str, field: FieldInfo, schema: dict[str, Any], usual: Any) -> dict[str, Any]:
    """One setting; ``usual``: its default where that depends on other settings."""
    entry = schema["properties"][key]
    default = to_jsonable_python(usual)
    if not field.is_required() and not field.default_factory_takes_validated_data:
        default = to_jsonable_python(field.get_default(call_default_factory=True))
    return {
        "name": key,
        "type": _type(entry, schema.get("$defs", {})),
        "required": field.is_required(),
        "default": default,
        "description": field.description or "",
    }


def _type(entry: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema type in words: ``50% or 0.5``, ``bf16 | fp16``, ``list of text``."""
    if "examples" in entry:
        return "such as " + " or ".join(map(as_written, entry["examples"]))
    if "enum" in entry:
        return " | ".join(str(v) for v in entry["enum"])
    if "const" in entry:
        return str(entry["const"])
    if "anyOf" in entry:
        return " or ".join(_type(e, definitions) for e in entry["anyOf"] if e.get("type") != "null")
    if "$ref" in entry:
        return _type(definitions[entry["$ref"].rpartition("/")[2]], definitions)
    kind = entry.get("type")
    if "properties" in entry:
        return "section"
    if isinstance(kind, list):
        return " or ".join(_type({"type": k}, definitions) for k in kind)
    if kind == "array" and "prefixItems" in entry:
        return f"[{', '.join(_type(e, definitions) for e in entry['prefixItems'])}]"
    if kind == "array":
        return f"list of {_type(entry.get('items', {}), definitions)}"
    if kind == "object" and "additionalProperties" not in entry:
        return "mapping"
    if kind == "object":
        return f"mapping of text to {_type(entry.get('additionalProperties', {}), definitions)}"
    return {"string": "text", "boolean": "true or false", "integer": "integer", "number": "number"}.get(
        str(kind), "any"
    )
