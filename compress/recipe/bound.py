"""Load a recipe that has a bound, the section ``fit``, in place of passes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.recipe.fit import Bound
from compress.recipe.load import changed, mistakes, read_tree
from compress.recipe.model import Recipe
from compress.recipe.problems import ListNode, MapEntry, MapNode, Problem, Scalar, find_place, plain
from compress.recipe.validate import build


@dataclass(frozen=True)
class BoundRecipe:
    """A recipe with a bound.

    Attributes:
        fit: the bound. mapping: the other keys, as JSON values. recipe: the same with a cast as its only pass.
    """

    fit: Bound
    mapping: dict[str, Any]
    recipe: Recipe


def load_bound(recipe: Path | Mapping[str, Any], sets: Sequence[str] = (), *, check_files: bool = True) -> BoundRecipe:
    """Load a recipe with a section ``fit``.

    Args:
        recipe: a file, or a mapping with the keys of a file. sets: overrides, such as ``fit.max_bytes=200MB``.

    Raises:
        RecipeError: with every mistake.
    """
    problems: list[Problem] = []
    root = read_tree(recipe, problems)
    changed(root, sets, problems)
    if root is None or problems:
        raise mistakes(problems)
    if "fit" not in root.entries:
        hint = "run it with `compress run`" if "passes" in root.entries else "add `fit: {max_bytes: 200MB}`"
        raise mistakes([Problem("this recipe has no section `fit`", root.place, ("fit",), hint)])
    if "passes" in root.entries:
        place = find_place(root, ("passes",), key=True)
        raise mistakes([Problem("`fit` finds the passes", place, ("passes",), "leave out one of the two")])
    tree = copy.deepcopy(root)
    cast = MapNode(
        {"cast": MapEntry(MapNode({"weights": MapEntry(Scalar("int4", "int4", root.place))}, root.place))}, root.place
    )
    tree.entries["passes"] = MapEntry(ListNode([cast], root.place))
    made = build(tree, problems, check_files=check_files, complete=True)
    if made is None or made.fit is None or problems:
        raise mistakes(problems)
    mapping = {key: value for key, value in plain(root).items() if key != "fit"}
    return BoundRecipe(made.fit, mapping, made)
