"""Tree ▶ Recipe: types, then what concerns several keys; every mistake in the user's words, at its place."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from compress import passes
from compress.checkpoint.hub import is_hub_id
from compress.data.text import refusal
from compress.evaluation.tasks import TEXT_METRICS, Given, measurable
from compress.recipe.model import PassEntry, Recipe, metric_of, parse_pass
from compress.recipe.order import misplaced
from compress.recipe.problems import ListNode, MapNode, Node, Problem, Scalar, Source, dotted, find_place, plain
from compress.recipe.renamed import Renamed, spelled
from compress.recipe.renamed import find as find_renamed

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
_SECTIONS = ("data", "gates")  # where nothing below the key means none
_KEYS_SHOWN = 12


def build(root: MapNode, problems: list[Problem], *, check_files: bool, complete: bool) -> Recipe | None:
    """The recipe that a tree says; mistakes go to ``problems``, and None comes back where it says none.

    Without ``complete`` a base could not be read, so nothing is called missing.
    """
    values = _values(root)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate_json(json.dumps(values), strict=True)
        recipe._source = Source(root)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        problems += _translated(root, [e for e in errors if complete or e["type"] != "missing" or len(e["loc"]) > 1])
    problems += _misplaced(root, values)
    if complete:
        problems += _lacking(root, values)
    if check_files:
        problems += _missing_files(root)
    return recipe


def _values(root: MapNode) -> dict[str, Any]:
    values: dict[str, Any] = plain(root)
    for key in _SECTIONS:
        if key in values and values[key] is None:
            del values[key]
    if isinstance(gates := values.get("gates"), dict):  # `kl:` with nothing is a gate without a bound
        values["gates"] = {name: {} if gate is None else gate for name, gate in gates.items()}
    return values


# --- types: pydantic's errors in words for people


def _translated(root: MapNode, errors: list[ErrorDetails]) -> Iterator[Problem]:
    """One problem per place: the members of a union that refuse the same value become one sentence."""
    groups: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    for error in errors:
        path = _path(root, error)
        if error["type"] == "default_factory_not_called":  # what the default depends on is wrong already
            continue
        if (
            error["type"] == "too_short"
            and isinstance(node := _node(root, path), ListNode)
            and len(node.items) >= (error["ctx"]["min_length"])
        ):  # pydantic counts the entries that are right
            continue
        if error["type"] == "extra_forbidden":
            yield _unknown_key(root, path)
        elif error["type"] == "missing":
            yield _missing_key(root, path)
        else:
            groups.setdefault(path, []).append(error)
    for path, group in groups.items():
        yield _wrong_value(root, path, group)


def _path(root: MapNode, error: ErrorDetails) -> tuple[str | int, ...]:
    """pydantic's location as keys of the tree: without tags of unions, with the name of the pass."""
    node: Node | None = root
    path: list[str | int] = []
    last = len(error["loc"]) - 1
    for i, part in enumerate(error["loc"]):
        if len(path) == 2 and path[0] == "passes" and (name := _pass_name(node)) is not None:
            path.append(name)
            node = _child(node, name)
        child = _child(node, part)
        if child is not None:
            path.append(part)
            node = child
        elif i == last and error["type"] == "missing":
            path.append(part)
    return tuple(path)


def _child(node: Node | None, part: str | int) -> Node | None:
    if isinstance(node, MapNode) and str(part) in node.entries:
        return node.entries[str(part)].node
    if isinstance(node, ListNode) and isinstance(part, int) and part < len(node.items):
        return node.items[part]
    return None


def _pass_name(node: Node | None) -> str | None:
    if isinstance(node, MapNode):
        return next(iter(node.entries)) if len(node.entries) == 1 else None
    return _text(node)


def _node(root: Node, path: tuple[str | int, ...]) -> Node | None:
    node: Node | None = root
    for part in path:
        node = _child(node, part)
    return node


def _fields(path: tuple[str | int, ...]) -> dict[str, Any]:
    """Fields of the model at a path, those of its own before inherited ones; empty where it is no model."""
    if len(path) >= 3 and path[0] == "passes":
        found: list[type[BaseModel]] = [passes.get(str(path[2])).settings]
        rest = path[3:]
    else:
        found, rest = [Recipe], path
    for part in rest:
        if isinstance(part, str):
            annotations = [m.model_fields[part].annotation for m in found if part in m.model_fields]
            found = [m for annotation in annotations for m in _models_in(annotation)]
    fields: dict[str, Any] = {}
    for each in found:
        own = [name for name in each.model_fields if name in each.__annotations__]
        fields |= {name: each.model_fields[name] for name in [*own, *(n for n in each.model_fields if n not in own)]}
    return fields


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _owner(path: tuple[str | int, ...]) -> str:
    """` in prune_unstructured`, ` in data.evaluation`; nothing at the top."""
    if not path:
        return ""
    inside = path[2:] if path[0] == "passes" and len(path) > 2 else path
    return f" in {dotted(inside)}"


def _unknown_key(root: MapNode, path: tuple[str | int, ...]) -> Problem:
    key, owner = str(path[-1]), path[:-1]
    place = find_place(root, path, key=True)
    if (entry := _renamed(path)) is not None and entry.new != entry.old:
        node = _node(root, path)
        value = node.value if isinstance(node, Scalar) else None
        new = f"`{entry.new.rpartition('.')[2]}`"
        hint = f"write `{spelled(entry.new, entry.value(value))}`" if value is not None else f"rename the key to {new}"
        return Problem(f"`{key}`{_owner(owner)} is called {new} now", place, path, hint)
    names = list(_fields(owner)) + (["extends"] if not owner else [])
    return Problem(f"unknown key `{key}`{_owner(owner)}", place, path, _choices(key, names))


def _renamed(path: tuple[str | int, ...]) -> Renamed | None:
    """The table's entry for the key at a path, where it is an old one or has old values."""
    in_pass = len(path) > 3 and path[0] == "passes"
    return find_renamed(str(path[2]) if in_pass else "", dotted(path[3:] if in_pass else path))


def _choices(given: str, names: list[str]) -> str | None:
    if not names:
        return None
    close = difflib.get_close_matches(given, names, n=1)
    shown = ", ".join(names[:_KEYS_SHOWN]) + (", …" if len(names) > _KEYS_SHOWN else "")
    return f"expected one of: {shown}" + (f"; did you mean `{close[0]}`?" if close else "")


def _missing_key(root: MapNode, path: tuple[str | int, ...]) -> Problem:
    key, owner = str(path[-1]), path[:-1]
    field = _fields(owner).get(key)
    hint = f"{key}: {field.description}" if field is not None and field.description else None
    return Problem(f"`{key}` is missing{_owner(owner)}", find_place(root, owner, key=True), path, hint)


def _wrong_value(root: MapNode, path: tuple[str | int, ...], errors: list[ErrorDetails]) -> Problem:
    node = _node(root, path)
    expected = list(dict.fromkeys(filter(None, (_expected(error) for error in errors))))
    place = find_place(root, path)
    whole = next((error for error in errors if _expected(error) is None), None)
    if whole is not None or not expected:
        whole = whole or errors[0]
        if whole["type"] == "pass_entry":
            place = find_place(root, (*path, name), key=True) if (name := _pass_name(node)) else place
        elif isinstance(node, MapNode) and path:  # a claim about several of its keys
            place = find_place(root, path, key=True)
            if len(path) == 2 and path[0] == "passes" and (name := _pass_name(node)):
                place = find_place(root, (*path, name), key=True)
        return Problem(_sentence(whole), place, path, whole.get("ctx", {}).get("hint"))
    wanted = " or ".join(expected)
    message = f"expected {wanted}" + (f", got {_got(node)}" if node is not None else "")
    if node is not None and path and isinstance(path[-1], str):
        message = f"{path[-1]}: {message}"
    if (entry := _renamed(path)) is not None and isinstance(node, Scalar) and entry.knows(node.value):
        return Problem(message, place, path, f"`{node.value}` is called `{entry.value(node.value)}` now")
    return Problem(message, place, path, _value_hint(node, wanted, errors))


def _expected(error: ErrorDetails) -> str | None:
    """What was wanted, as a phrase; None where only a whole sentence says it."""
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


def _value_hint(node: Node | None, wanted: str, errors: list[ErrorDetails]) -> str | None:
    if not isinstance(node, Scalar) or node.value is None:
        return None
    kinds = {error["type"] for error in errors}
    if kinds & {"literal_error", "enum"}:
        allowed = re.findall(r"'([^']*)'", " ".join(str(error.get("ctx", {}).get("expected")) for error in errors))
        close = difflib.get_close_matches(str(node.value), allowed, n=1)
        return f"did you mean `{close[0]}`?" if close else None
    if wanted == "a list":
        return f"write [{node.text}]"
    if wanted == "text" and not isinstance(node.value, str):
        return f'write "{node.text}", in quotes'
    if (
        isinstance(node.value, str)
        and wanted in ("an integer", "a number")
        and re.fullmatch(r"[0-9][0-9_,]*(\.[0-9]+)?", node.value)
    ):
        return "write it without quotes, `_` or `,`"
    if isinstance(node.value, str) and wanted == "true or false" and node.value.lower() in ("yes", "no", "on", "off"):
        return f"write {'true' if node.value.lower() in ('yes', 'on') else 'false'}"
    return None


# --- what concerns several keys


def _misplaced(root: MapNode, values: dict[str, Any]) -> Iterator[Problem]:
    """Passes in an order that they do not allow."""
    for wrong in misplaced(list(_entries(values))):
        yield Problem(wrong.message, *_at_pass(root, wrong.index), wrong.hint)


#: What a metric that such data do not give is read off, and what to do.
_LACKING: dict[Given, tuple[str, str]] = {
    "images": ("is read off text, not images", "name `files` in data.evaluation"),
    "labelled": ("is read off text without labels", "leave out `label`"),
    "text": ("is read off text with labels", "add to data.evaluation: `text: COLUMN, label: COLUMN`"),
}


def _lacking(root: MapNode, values: dict[str, Any]) -> Iterator[Problem]:
    """Passes, metrics and gates that need text which ``data`` does not give, or text of another kind."""
    data = values.get("data", {})
    if not isinstance(data, dict):
        return
    given = {name for name, value in data.items() if value is not None}
    for index, entry in _entries(values):
        for name in sorted(passes.get(entry.name).required_data(entry.settings) - given):
            yield Problem(
                f"{entry.name} needs {name} text, and there is no `data.{name}`",
                *_at_pass(root, index),
                _data_hint(name),
            )
    lacking, hint = "needs text to measure on, and there is no `data.evaluation`", _data_hint("evaluation")
    possible: frozenset[str] = frozenset()
    if "evaluation" in given:
        keys = data["evaluation"] if isinstance(data["evaluation"], dict) else {}
        kind: Given = "images" if keys.get("images") else "text" if keys.get("label") is None else "labelled"
        possible = measurable(kind)
        lacking, hint = _LACKING[kind]
    wanted = values.get("evaluate")
    for i, metric in enumerate(wanted if isinstance(wanted, list) else []):
        if isinstance(metric, str) and metric in TEXT_METRICS - possible:
            path: tuple[str | int, ...] = ("evaluate", i)
            yield Problem(f"{metric} {lacking}", find_place(root, path), path, hint)
    gates = values.get("gates")
    for gate in gates if isinstance(gates, dict) else {}:
        if metric_of(gate) in TEXT_METRICS - possible:
            path = ("gates", gate)
            place = find_place(root, path, key=True)
            yield Problem(f"the gate {gate} {lacking}", place, path, hint)


def _entries(values: dict[str, Any]) -> Iterator[tuple[int, PassEntry]]:
    listed = values.get("passes")
    for index, value in enumerate(listed if isinstance(listed, list) else []):
        with contextlib.suppress(ValidationError, PydanticCustomError):  # reported by `_translated`, with its place
            yield index, parse_pass(value)


def _at_pass(root: MapNode, index: int) -> tuple[Any, tuple[str | int, ...]]:
    name = _pass_name(_node(root, ("passes", index)))
    path = ("passes", index, name or "")
    return find_place(root, path, key=True), path


def _data_hint(name: str) -> str:
    return f"add to data: `{name}: {{files: [FILE]}}`"


def _missing_files(root: MapNode) -> Iterator[Problem]:
    """Data files that are missing or of an unknown kind, and a model that is neither a folder nor, by its form, a hub id."""
    data = root.get("data")
    for name, entry in data.entries.items() if isinstance(data, MapNode) else ():
        files = entry.node.get("files") if isinstance(entry.node, MapNode) else None
        images = _text(entry.node.get("images")) if isinstance(entry.node, MapNode) else None
        if images and not (path := _local(images)).is_dir():
            what = "is no folder" if path.exists() else "there is no such folder"
            key = ("data", name, "images")
            yield Problem(f"{images}: {what}", find_place(root, key), key, _near(path))
        for i, item in enumerate(files.items if isinstance(files, ListNode) else ()):
            text = _text(item)
            if text and not (path := _local(text)).is_file():
                what = "is a folder, not a text file" if path.is_dir() else "there is no such file"
                yield Problem(f"{text}: {what}", item.place, ("data", name, "files", i), _near(path))
            elif text and (wrong := refusal(text, ids=name != "evaluation")):
                yield Problem(f"{text}: {wrong}", item.place, ("data", name, "files", i))
    if text := _text(root.get("model")):
        path, place = _local(text), find_place(root, ("model",))
        if path.exists():
            if not path.is_dir():
                yield Problem(f"{text}: is a file, not a checkpoint's folder", place, ("model",))
        elif not is_hub_id(text):
            hint = _near(path) or "a hub id is `name` or `organisation/name`"
            yield Problem(f"{text}: there is no such folder", place, ("model",), hint)


def _text(node: Node | None) -> str | None:
    return node.value if isinstance(node, Scalar) and isinstance(node.value, str) else None


def _local(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~name of nobody
        return Path(text)


def _near(path: Path) -> str | None:
    """A neighbour with a name much like it; else where the path ends to exist."""
    if path.exists():
        return None
    try:
        if path.parent.is_dir():
            names = [entry.name for entry in path.parent.iterdir()]
            close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
            return f"did you mean `{path.parent / close[0]}`?" if close else None
        existing = next((parent for parent in path.parents if parent.is_dir()), None)
    except OSError:
        return None
    return f"relative paths start at the current folder, {Path.cwd()}" if existing == Path() else None
