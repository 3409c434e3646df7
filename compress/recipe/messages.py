"""pydantic's errors in the words of a recipe, each at its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from compress import passes
from compress.recipe.gates import Gates
from compress.recipe.metric_entries import SETTINGS
from compress.recipe.model import Recipe
from compress.recipe.problems import (
    ListNode,
    MapNode,
    Node,
    Problem,
    Scalar,
    child_of,
    dotted,
    find_place,
    is_null,
    node_at,
    pass_name,
)
from compress.recipe.renamed import Renamed, spelled
from compress.recipe.renamed import find as find_renamed
from compress.recipe.suggest import choices, meant_key, percentage, scheme, value_hint

#: pydantic's error type ▶ what it expected. A type that is not here keeps pydantic's sentence.
_EXPECTED = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dataclass_type": "a mapping",
    "none_required": "null",
    "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "a number below {lt}",
    "less_than_equal": "{le} or less",
    "multiple_of": "a multiple of {multiple_of}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "amount": "{expected}",
}
#: Sections that are mappings ▶ how they are written.
_EXAMPLES = {
    "gates": "write a mapping: `size: {max_ratio: 0.5}`",
    "data": "write a mapping: `evaluation: {files: [FILE]}`",
    "training": "write a mapping: `{files: [FILE]}`",
    "calibration": "write a mapping, `{files: [FILE]}`, or `default`",
    "evaluation": "write a mapping, `{files: [FILE]}`, or `default`",
}
#: Lists of entries that are a name, or a name with settings.
_LISTS = ("passes", "evaluate")


def translate(root: MapNode, errors: list[ErrorDetails]) -> Iterator[Problem]:
    """One problem per place. Errors of all members of a union at one value become one sentence."""
    groups: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    meant = {key for error in errors if error["type"] == "extra_forbidden" for key in _meant(_path(root, error))}
    for error in errors:
        path = _path(root, error)
        if error["type"] == "default_factory_not_called":  # the setting that the default depends on is reported
            continue
        if (
            error["type"] == "too_short"
            and isinstance(node := node_at(root, path), ListNode)
            and len(node.items) >= (error["ctx"]["min_length"])
        ):  # pydantic counts valid entries only
            continue
        if error["type"] == "extra_forbidden":
            yield _unknown_key(root, path)
        elif error["type"] == "missing":
            if path not in meant:  # the unknown key is reported
                yield _missing_key(root, path)
        else:
            groups.setdefault(path, []).append(error)
    for path, group in groups.items():
        yield _wrong_value(root, path, group)


def _path(root: MapNode, error: ErrorDetails) -> tuple[str | int, ...]:
    """pydantic's location as a path of keys: without tags of unions, with the name of the pass."""
    node: Node | None = root
    path: list[str | int] = []
    last = len(error["loc"]) - 1
    for i, part in enumerate(error["loc"]):
        if len(path) == 2 and path[0] in _LISTS and (name := pass_name(node)) is not None:
            path.append(name)
            node = child_of(node, name)
        child = child_of(node, part)
        if child is not None:
            path.append(part)
            node = child
        elif i == last and error["type"] == "missing":
            path.append(part)
    return tuple(path)


def _fields(path: tuple[str | int, ...]) -> dict[str, Any]:
    """Fields of the model at a path, own fields before inherited ones; empty where there is no model."""
    if len(path) >= 3 and path[0] in _LISTS:
        name = str(path[2])
        models: list[type[BaseModel]] = [passes.get(name).settings if path[0] == "passes" else SETTINGS[name]]
        rest = path[3:]
    else:
        models, rest = [Recipe], path
    for part in rest:
        if isinstance(part, str):
            annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
            models = [m for annotation in annotations for m in models_in(annotation)]
    fields: dict[str, Any] = {}
    for each in models:
        # the gates of metrics are inherited, yet listed where the reference has them
        own = [name for name in each.model_fields if name in each.__annotations__ and each is not Gates]
        fields |= {name: each.model_fields[name] for name in [*own, *(n for n in each.model_fields if n not in own)]}
    return fields


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings models in an annotation, inside unions and lists too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def _owner(path: tuple[str | int, ...]) -> str:
    """` in prune_unstructured`, ` in data.evaluation`; nothing at the top."""
    if not path:
        return ""
    inside = path[2:] if path[0] in _LISTS and len(path) > 2 else path
    return f" in {dotted(inside)}"


def _unknown_key(root: MapNode, path: tuple[str | int, ...]) -> Problem:
    key, owner = str(path[-1]), path[:-1]
    place, node = find_place(root, path, key=True), node_at(root, path)
    value = node.value if isinstance(node, Scalar) else None
    if (entry := _renamed(path)) is not None and entry.new != entry.old:
        new = f"`{entry.new.rpartition('.')[2]}`"
        write = f"write `{spelled(entry.new, entry.value(value))}`" if value is not None else f"rename the key to {new}"
        return Problem(f"`{key}`{_owner(owner)} is called {new} now", place, path, write)
    section = dotted(owner[2:] if owner and owner[0] in _LISTS else owner)
    answer = scheme(value) if section == "cast" and isinstance(value, str) else None
    names = list(_fields(owner)) + (["extends"] if not owner else [])
    return Problem(f"unknown key `{key}`{_owner(owner)}", place, path, answer or choices(key, names, section))


def _meant(path: tuple[str | int, ...]) -> list[tuple[str | int, ...]]:
    """Paths of the keys that an unknown key probably means."""
    owner = path[:-1]
    section = dotted(owner[2:] if owner and owner[0] in _LISTS else owner)
    return [(*owner, key) for key in meant_key(str(path[-1]), list(_fields(owner)), section)]


def _renamed(path: tuple[str | int, ...]) -> Renamed | None:
    """The entry of the table of renamed keys for a path; None for a key that was not renamed."""
    in_pass = len(path) > 3 and path[0] == "passes"
    return find_renamed(str(path[2]) if in_pass else "", dotted(path[3:] if in_pass else path))


def _missing_key(root: MapNode, path: tuple[str | int, ...]) -> Problem:
    key, owner = str(path[-1]), path[:-1]
    field = _fields(owner).get(key)
    hint = f"{key}: {field.description}" if field is not None and field.description else None
    return Problem(f"`{key}` is missing{_owner(owner)}", find_place(root, owner, key=True), path, hint)


def _wrong_value(root: MapNode, path: tuple[str | int, ...], errors: list[ErrorDetails]) -> Problem:
    node = node_at(root, path)
    expected = list(dict.fromkeys(filter(None, (_expected(error) for error in errors))))
    whole = next((error for error in errors if _expected(error) is None), None)
    if whole is not None or not expected:
        return _whole_problem(root, path, node, whole or errors[0])
    wanted = " or ".join(expected)
    message = f"expected {wanted}" + (f", got {_got(node)}" if node is not None else "")
    if node is not None and path and isinstance(path[-1], str):
        message = f"{path[-1]}: {message}"
    return Problem(message, find_place(root, path), path, _value_hint(node, path, wanted, errors))


def _whole_problem(root: MapNode, path: tuple[str | int, ...], node: Node | None, error: ErrorDetails) -> Problem:
    """A mistake that has a sentence of its own; it concerns a pass, or several keys of a mapping."""
    place = find_place(root, path)
    name = pass_name(node) if len(path) == 2 and path[0] in _LISTS else None
    if name and (error["type"] in ("pass_entry", "metric_entry") or isinstance(node, MapNode)):
        place = find_place(root, (*path, name), key=True)
    elif isinstance(node, MapNode) and path:
        place = find_place(root, path, key=True)
    return Problem(_sentence(error), place, path, error.get("ctx", {}).get("hint"))


def _expected(error: ErrorDetails) -> str | None:
    """The expected value as a phrase; None for an error with a sentence of its own."""
    context = error.get("ctx", {})
    if error["type"] in ("too_short", "too_long"):
        short = error["type"] == "too_short"
        count = context["min_length" if short else "max_length"]
        return f"at {'least' if short else 'most'} {count} {'entry' if count == 1 else 'entries'}"
    template = _EXPECTED.get(error["type"])
    if template is None:
        return None
    phrase = template.format(**context)
    return re.sub(r"'([^']*)'", r"\1", phrase) if error["type"] in ("literal_error", "enum") else phrase


def _sentence(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    if error["type"] in ("value_error", "assertion_error"):
        return str(context["error"])
    text = error["msg"]
    return f"expected {text.removeprefix('Input should be ')}" if text.startswith("Input should be ") else text


def _got(node: Node | None) -> str:
    if isinstance(node, ListNode):
        return "a list" if node.items else "an empty list"
    if isinstance(node, MapNode):
        return "a mapping"
    assert node is not None
    if node.value is None:
        return "nothing"
    text = repr(node.value) if isinstance(node.value, str) else node.text
    return text if len(text) <= 60 else f"{text[:59]}…"


def _value_hint(node: Node | None, path: tuple[str | int, ...], wanted: str, errors: list[ErrorDetails]) -> str | None:
    if isinstance(node, MapNode) and wanted == "a list" and node.entries:
        name, entry_ = next(iter(node.entries.items()))
        return f"write a list: `- {name}`" if is_null(entry_.node) else f"write a list: `- {name}: {{…}}`"
    if wanted == "a mapping" and path and (example := _EXAMPLES.get(str(path[0 if path[0] == "gates" else -1]))):
        return _as_mapping(node, path) or example
    if not isinstance(node, Scalar) or node.value is None:
        return None
    if (entry := _renamed(path)) is not None and entry.knows(node.value):
        return f"`{node.value}` is called `{entry.value(node.value)}` now"
    kinds = {error["type"] for error in errors}
    key = _setting(path)
    if kinds & {"literal_error", "enum"} or key in ("device", "pattern"):
        allowed = re.findall(r"'([^']*)'", " ".join(str(error.get("ctx", {}).get("expected")) for error in errors))
        return value_hint(key, node.value, allowed)
    counted = "a count" in wanted and not isinstance(node.value, int)
    if (
        "amount" in kinds
        and " share " in f" {wanted} "
        and not counted
        and (hint := percentage(node.value)) is not None
    ):
        return hint
    return _spelling_hint(node, wanted)


def _spelling_hint(node: Scalar, wanted: str) -> str | None:
    """How to write a value of the wrong form: without quotes, in brackets, as true or false."""
    if wanted == "a list":
        return f"write [{node.text}]"
    if wanted == "text" and not isinstance(node.value, str):
        return f'write "{node.text}", in quotes'
    if not isinstance(node.value, str):
        return None
    if wanted in ("an integer", "a number") and re.fullmatch(r"[0-9][0-9_,]*(\.[0-9]+)?", node.value):
        return "write it without quotes, `_` or `,`"
    if wanted == "true or false" and node.value.lower() in ("yes", "no", "on", "off"):
        return f"write {'true' if node.value.lower() in ('yes', 'on') else 'false'}"
    return None


def _as_mapping(node: Node | None, path: tuple[str | int, ...]) -> str | None:
    """A gate that is a size alone, with the bound that it stands for; None for other values."""
    if path[0] != "gates" or len(path) != 2 or not isinstance(node, Scalar):
        return None
    bounds = list(_fields(path))
    if bounds[:1] == ["max"] and "max_ratio" in bounds and re.fullmatch(r"[0-9.]+ *[kMGT]i?B", node.text):
        return f"write `{path[-1]}: {{max: {node.text}}}`"
    ratio = next((bound for bound in ("max_ratio", "max_increase", "max_drop", "min") if bound in bounds), bounds[0])
    return f"write `{path[-1]}: {{{ratio}: {node.text}}}`"


def _setting(path: tuple[str | int, ...]) -> str:
    """The key at a path: the setting of a pass, also for an entry inside it; else the last key."""
    if len(path) > 3 and path[0] in _LISTS:
        return str(path[3])
    return next((part for part in reversed(path) if isinstance(part, str)), "")
