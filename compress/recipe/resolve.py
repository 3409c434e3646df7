"""Write a recipe out with every default, as JSON values and as YAML. Reading that gives an equal recipe."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from decimal import Decimal
from enum import Enum
from typing import Any

from pydantic import BaseModel

from compress.data.default_text import named
from compress.escape import printable
from compress.recipe.gates import bounds
from compress.recipe.model import Recipe
from compress.settings import Increase, Pattern


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default as JSON values, without the gates and data sets that it does not have.

    Sizes are bytes, shares fractions, relative increases percentages, patterns ``n:m``.
    """
    values: dict[str, Any] = plain_settings(recipe)
    for section in ("data", "gates"):
        values[section] = {name: value for name, value in values[section].items() if value is not None}
    values["data"] = {
        name: {k: v for k, v in section.items() if v or k not in ("files", "images", "speech")}
        for name, section in values["data"].items()
    }
    values["log"] = {name: value for name, value in values["log"].items() if value is not None}
    if not values["log"]:
        del values["log"]
    for section in ("fit", "sweep"):
        if values[section] is None:
            del values[section]
    for section in values["data"].values():
        if section["dataset"] is not None:  # its files are those of this machine
            section.pop("files", None)
        else:
            for key in ("dataset", "subset", "split", "rows"):
                del section[key]
        if "files" in section:
            section["files"] = [named(file) for file in section["files"]]
    values["gates"] = {name: _gate(gate) for name, gate in values["gates"].items()}
    if recipe.evaluate is not None:
        values["evaluate"] = [e.name if e.plain else {e.name: plain_settings(e.settings)} for e in recipe.evaluate]
    values["export"] = [e.name if e.plain else {e.name: plain_settings(e.settings)} for e in recipe.export]
    values["passes"] = [{entry.name: plain_settings(entry.settings)} for entry in recipe.passes]
    return values


def _gate(gate: Any) -> Any:
    """A gate without the bounds that it does not have; one of a list alone stands without the list."""
    several = [{k: v for k, v in each.items() if v is not None} for each in bounds(gate)]
    return several[0] if len(several) == 1 else several


def plain_settings(value: Any) -> Any:
    """Settings as JSON values, with amounts as in a recipe."""
    if isinstance(value, Increase):
        return _increase(value)
    if isinstance(value, BaseModel):
        return {name: plain_settings(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Pattern):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain_settings(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_settings(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain_settings(item) for item in value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _increase(increase: Increase) -> Any:
    if not increase.relative:
        return increase.value
    percent = f"{Decimal(repr(increase.value)) * 100:f}"
    percent = percent.rstrip("0").rstrip(".") if "." in percent else percent
    # a percentage is divided by 100 when read; where that rounds, write value and kind apart
    return f"{percent}%" if float(percent) / 100 == increase.value else {"value": increase.value, "relative": True}


def to_yaml(values: Mapping[str, Any]) -> str:
    """JSON values as YAML 1.2, keys in their order."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = 2**16  # no folding
    yaml.representer.sort_base_mapping_type_on_output = False
    yaml.representer.ignore_aliases = lambda _: True
    yaml.representer.add_representer(str, _quoted_where_needed)
    stream = io.StringIO()
    yaml.dump(dict(values), stream)
    if printable(stream.getvalue()) != stream.getvalue():
        yaml.allow_unicode = False  # escapes keep the text exact
        stream = io.StringIO()
        yaml.dump(dict(values), stream)
    return stream.getvalue()


def _quoted_where_needed(representer: Any, text: str) -> Any:
    # the library writes Unicode line breaks unescaped, and they are read back as spaces
    return representer.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')
