"""Load a recipe from a file (with ``extends``) or a Python mapping, and apply ``--set`` options."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from compress.errors import CompressError, RecipeError
from compress.files import expanded
from compress.recipe.entries import PassEntry
from compress.recipe.messages import translate
from compress.recipe.metric_entries import MetricEntry
from compress.recipe.model import Recipe
from compress.recipe.overrides import EXAMPLES, parse_set
from compress.recipe.problems import (
    ListNode,
    MapEntry,
    MapNode,
    Node,
    Origin,
    Place,
    Problem,
    Scalar,
    dotted,
    find_place,
    in_order,
    is_null,
)
from compress.recipe.resolve import plain_settings
from compress.recipe.space import searches
from compress.recipe.validate import build, spell_default_text
from compress.settings import Pattern


def load_recipe(path: Path, sets: Sequence[str] = (), *, check_files: bool = True) -> Recipe:
    """Load the recipe in a file.

    Args:
        path: YAML, UTF-8, up to 1 MB. ``extends: other.yaml`` is relative to the file that contains it.
        sets: overrides such as ``passes.0.cast.weights=fp16``; the value is YAML.
        check_files: check that the model and the text files exist.

    Raises:
        RecipeError: with every mistake in the recipe, in the files it extends, and in the overrides.
    """
    problems: list[Problem] = []
    files = _Files(problems)
    return _finish(files.read(path, ()), sets, files, check_files)


def recipe_from_mapping(mapping: Mapping[str, Any], sets: Sequence[str] = (), *, check_files: bool = True) -> Recipe:
    """Build a recipe from a mapping with the keys of a file. Mistakes are located by their keys.

    Tuples serve as lists, paths as text. ``extends`` is relative to the current folder. Raises `RecipeError`.
    """
    problems: list[Problem] = []
    root = _from_python(mapping, (), problems)
    assert isinstance(root, MapNode)
    files = _Files(problems)
    return _finish(files.extended(root, Path("mapping"), ()), sets, files, check_files)


def read_gates(gates: Mapping[str, Any], sets: Sequence[str] = ()) -> dict[str, Any]:
    """Read gates outside a recipe, into the plain form that `compress.gates.judge` reads.

    Args:
        gates: as in a recipe. sets: further gates, or replacements, such as ``bits_per_byte.max_increase=3%``.

    Raises:
        RecipeError: with every mistake.
    """
    problems: list[Problem] = []
    root = _from_python(
        {"model": ".", "output": ".", "passes": [{"cast": {"weights": "bf16"}}], "gates": gates}, (), problems
    )
    assert isinstance(root, MapNode)
    for rank, text in enumerate(sets):
        if (change := parse_set(text, rank, problems, option="--gate")) is not None:
            change.path.insert(0, "gates")
            change.apply(root, problems)
    recipe = build(root, problems, check_files=False, complete=False)
    if recipe is None or problems:
        raise mistakes(problems)
    return recipe.gates.model_dump(exclude_none=True)


def read_metrics(texts: Sequence[str], option: str = "--metric") -> tuple[MetricEntry, ...]:
    """Read metrics as the command line has them: ``kl``, or ``latency.lengths=[512,2048]`` for a setting.

    Raises:
        RecipeError: with every mistake.
    """
    problems: list[Problem] = []
    entries: dict[str, Node] = {}
    for rank, text in enumerate(texts):
        if "=" not in text:
            entries.setdefault(text, Scalar(text, text, Place(Origin(f"{option} {text}", rank=1_000 + rank))))
        elif (change := parse_set(text, rank, problems, option=option)) is not None:
            name = change.path.pop(0)
            if not change.path:
                problems.append(
                    Problem(f"`{name}` takes settings", change.place, hint=f"as {option} {EXAMPLES[option]}")
                )
                continue
            node = entries.get(name)
            if not isinstance(node, MapNode):
                entries[name] = node = MapNode({name: MapEntry(MapNode({}, change.place), change.place)}, change.place)
            change.apply(node.entries[name].node, problems)
    root = _from_python({"model": ".", "output": ".", "passes": [{"cast": {"weights": "bf16"}}]}, (), problems)
    assert isinstance(root, MapNode)
    root.entries["evaluate"] = MapEntry(ListNode([*entries.values()]))
    recipe = build(root, problems, check_files=False, complete=False)
    if recipe is None or problems:
        raise mistakes(problems)
    return recipe.evaluate or ()


def settings_error(name: str, settings: Mapping[str, Any], error: ValidationError) -> CompressError:
    """The first mistake in settings of a pass that were given in Python, in the words of a recipe.

    Args:
        name: of the pass. error: what its settings model raised.
    """
    root = _from_python({"passes": [{name: settings}]}, (), [])
    assert isinstance(root, MapNode)
    located = error.errors(include_url=False)
    for one in located:
        one["loc"] = ("passes", 0, *one["loc"])
    first = in_order(translate(root, located))[0]
    message = first.message.removeprefix(f"{first.path[-1]}: ")
    return CompressError(message, where=dotted(first.path[2:]) or name, fix=first.hint)


def mistakes(problems: Sequence[Problem]) -> RecipeError:
    """The error that lists problems, by file and line."""
    ordered = in_order(problems)
    shown = ordered[: RecipeError.SHOWN]
    return RecipeError([p.render() for p in shown], len(ordered), [p.mistake() for p in shown])


def _finish(root: MapNode | None, sets: Sequence[str], files: _Files, check_files: bool) -> Recipe:
    recipe, problems = None, files.problems
    changed(root, sets, problems)
    if root is not None and searches(root):
        place = find_place(root, ("sweep",), key=True) if "sweep" in root.entries else root.place
        problems.append(Problem("this recipe searches for values", place, ("sweep",), "run it with `compress sweep`"))
    elif root is not None and "fit" in root.entries:
        place = find_place(root, ("fit",), key=True)
        problems.append(Problem("this recipe has a bound", place, ("fit",), "run it with `compress fit`"))
    elif root is not None:
        recipe = build(root, problems, check_files=check_files, complete=files.complete)
    if recipe is None or problems:
        raise mistakes(problems)
    return recipe


def changed(root: MapNode | None, sets: Sequence[str], problems: list[Problem]) -> None:
    """Apply ``--set`` options to a tree. Mistakes in them go to ``problems``."""
    for change in [parse_set(text, rank, problems) for rank, text in enumerate(sets)]:
        if root is not None:
            spell_default_text(root)
            if change is not None:
                change.apply(root, problems)


def read_tree(recipe: Path | Mapping[str, Any], problems: list[Problem]) -> MapNode | None:
    """The tree of a file or a mapping, merged with what it extends; None where it cannot be read, and why in ``problems``."""
    files = _Files(problems)
    if not isinstance(recipe, Mapping):
        root = files.read(recipe, ())
    else:
        made = _from_python(recipe, (), problems)
        assert isinstance(made, MapNode)
        root = files.extended(made, Path("mapping"), ())
    return root if files.complete else None


_UNREADABLE: dict[type[OSError], str] = {
    FileNotFoundError: "there is no such file",
    IsADirectoryError: "is a folder, not a recipe",
}


#: Names of files that a recipe may extend.
_SUFFIXES = (".yaml", ".yml", ".json")


class _Files:
    """Reads files and the files that they extend. ``complete`` becomes false if one of these cannot be read."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.complete = True

    def read(self, path: Path, parents: tuple[Path, ...], at: Place | None = None) -> MapNode | None:
        """The tree of a file, or None. ``parents`` are the files that extend it, ``at`` is the last ``extends``."""
        from compress.recipe.nodes import MAX_BYTES, decode, parse  # `apply` reads no YAML and works without its reader

        origin = Origin(str(path), rank=len(parents))
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            reason = _UNREADABLE.get(type(error), f"cannot be read: {error.strerror}")
            hint = _sibling(path) if not path.is_dir() else f"`compress init {path}` writes one for a model"
            self.problems.append(Problem(f"{path}: {reason}" if at else reason, at or Place(origin), hint=hint))
            return None
        decoded = decode(data, str(path), len(parents))
        if isinstance(decoded, Problem):
            self.problems.append(decoded)
            return None
        text, origin = decoded
        before = len(self.problems)
        root = parse(text, origin, self.problems)
        if root is None and len(self.problems) > before:
            return None
        if root is None or is_null(root):
            self.problems.append(
                Problem("is empty", Place(origin), hint="a recipe needs `model`, `output` and `passes`")
            )
            return None
        if not isinstance(root, MapNode):
            kind = "a list" if isinstance(root, ListNode) else "a single value"
            hint = "a recipe is a mapping, as `model: …`, `output: …`, `passes: …`"
            self.problems.append(Problem(f"expected a mapping at the top, got {kind}", root.place, hint=hint))
            return None
        root.place = Place(origin)
        return self.extended(root, path, (*parents, path))

    def extended(self, root: MapNode, path: Path, parents: tuple[Path, ...]) -> MapNode:
        """The tree merged over the tree of its ``extends``; ``parents`` ends with this file."""
        entry = root.entries.pop("extends", None)
        if entry is None:
            return root
        node = entry.node
        place = node.place if node.place is not None and node.place.width and node.place.whole else entry.key
        if not isinstance(node, Scalar) or not isinstance(node.value, str) or not node.value:
            self.complete = False
            self.problems.append(Problem("`extends` expects the path of one recipe", place, ("extends",)))
            return root
        try:
            base_path = Path(os.path.normpath(path.parent / expanded(node.value)))
        except CompressError as error:
            self.complete = False
            self.problems.append(Problem(str(error), place, ("extends",)))
            return root
        if base_path.suffix.lower() not in _SUFFIXES:
            # a mistake is shown with its line, so a foreign recipe could print any file of this machine
            self.complete = False
            message = f"`extends` expects a recipe, whose name ends in {', '.join(_SUFFIXES)}; {base_path} does not"
            self.problems.append(Problem(message, place, ("extends",)))
            return root
        known = [os.path.realpath(parent) for parent in parents]
        if (real := os.path.realpath(base_path)) in known:
            self.complete = False
            loop = " ▶ ".join(str(parent) for parent in [*parents[known.index(real) :], base_path])
            self.problems.append(Problem(f"`extends` leads back to itself: {loop}", place, ("extends",)))
            return root
        base = self.read(base_path, parents, place)
        self.complete = self.complete and base is not None
        return root if base is None else _over(base, root)


def _over(base: MapNode, top: MapNode) -> MapNode:
    """Merge ``top`` over ``base``: mappings key by key; every other value of ``top`` replaces the base's."""
    entries = dict(base.entries)
    for key, entry in top.entries.items():
        below = entries.get(key)
        if below is not None and isinstance(below.node, MapNode) and isinstance(entry.node, MapNode):
            entries[key] = MapEntry(_over(below.node, entry.node), entry.key)
        else:
            entries[key] = entry
    return MapNode(entries, top.place)


def _sibling(path: Path) -> str | None:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f"did you mean `{path.parent / close[0]}`?" if close and close[0] != path.name else None


def _from_python(value: Any, path: tuple[str | int, ...], problems: list[Problem]) -> Node:
    """The tree of plain Python values. Settings models and amounts become what they are in YAML."""
    if len(path) > 64:
        problems.append(Problem("nested more than 64 deep", path=path))
        return Scalar(None, "")
    if isinstance(value, (PassEntry, MetricEntry)):
        value = {value.name: value.settings}
    elif isinstance(value, (BaseModel, Pattern)):
        value = plain_settings(value)
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, Mapping):
        return MapNode(
            {str(key): MapEntry(_from_python(item, (*path, str(key)), problems)) for key, item in value.items()}
        )
    if isinstance(value, (list, tuple)):
        return ListNode([_from_python(item, (*path, i), problems) for i, item in enumerate(value)])
    if isinstance(value, str):
        from compress.recipe.nodes import unusable

        if bad := unusable(value):
            problems.append(Problem(bad, path=path))
            return Scalar(None, "")
        return Scalar(value, value)
    if isinstance(value, float) and not abs(value) < float("inf"):
        problems.append(Problem(f"{value} is not a finite number", path=path))
        return Scalar(0.0, str(value))
    if value is None or isinstance(value, (bool, int, float)):
        return Scalar(value, str(value))
    problems.append(
        Problem(f"expected a plain value (text, number, list, mapping), got {type(value).__name__}", path=path)
    )
    return Scalar(None, "")
