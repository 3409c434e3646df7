"""Load the recipe of a sweep, with every value to search checked by the settings of its pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.recipe.load import changed, mistakes, read_tree
from compress.recipe.model import Recipe
from compress.recipe.problems import MapEntry, MapNode, Problem, find_place, plain
from compress.recipe.space import Dimension, active, grid, searches, substituted, take_space
from compress.recipe.sweep import Sweep
from compress.recipe.validate import build, spell_default_text

#: Trials of a sampler that has no end.
_TRIALS = 32


@dataclass(frozen=True)
class SearchRecipe:
    """A recipe with values to search.

    Attributes:
        written: the whole tree. tree: without ``optional``. space: what is searched. recipe: with the first value of each,
            the bounds of the sweep among its gates.
    """

    written: MapNode
    tree: MapNode
    space: tuple[Dimension, ...]
    recipe: Recipe

    @property
    def sweep(self) -> Sweep:
        """Goals, bounds and sampler."""
        assert self.recipe.sweep is not None
        return self.recipe.sweep

    @property
    def trials(self) -> int:
        """The most trials."""
        most = self.sweep.trials
        if self.sweep.sampler != "grid":
            return most or _TRIALS
        count = sum(1 for _ in self.grid())
        return count if most is None else min(most, count)

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination once: values inside a pass that is left out make no difference."""
        seen = []
        for values in grid(self.space):
            if (kept := active(self.space, values)) not in seen:
                seen.append(kept)
                yield kept

    def mapping(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe of a trial as JSON values, the bounds of the sweep among its gates."""
        made: dict[str, Any] = plain(_of_trial(self.tree, self.space, values))
        return made

    def trial(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial. Raises `RecipeError` where the values do not go together."""
        problems: list[Problem] = []
        recipe = build(_of_trial(self.tree, self.space, values), problems, check_files=False, complete=True)
        if recipe is None or problems:
            raise mistakes(problems)
        return recipe


def load_search(
    recipe: Path | Mapping[str, Any], sets: Sequence[str] = (), *, check_files: bool = True
) -> SearchRecipe:
    """Load the recipe of a sweep. Every choice is tried, and both ends of every range.

    Args:
        recipe: a file, or a mapping with the keys of a file. sets: overrides, as `load_recipe` takes them.

    Raises:
        RecipeError: with every mistake.
    """
    problems: list[Problem] = []
    root = read_tree(recipe, problems)
    changed(root, sets, problems)
    if root is None or problems:
        raise mistakes(problems)
    if "sweep" not in root.entries:
        hint = "add `sweep: {minimize: [size, kl]}`" if searches(root) else "run it with `compress run`"
        raise mistakes([Problem("this recipe has no section `sweep`", root.place, ("sweep",), hint)])
    tree = copy.deepcopy(root)
    spell_default_text(tree)
    space = take_space(tree, problems)
    if not space and not problems:
        place = find_place(root, ("sweep",), key=True)
        problems.append(Problem("nothing is searched", place, ("sweep",), "write `{search: [4, 8]}` for a value"))
    if problems:
        raise mistakes(problems)
    first = {d.name: d.ends()[0] for d in space}
    made = build(substituted(tree, space, first), problems, check_files=check_files, complete=True)
    for dimension in space:
        for value in dimension.ends()[1:] if made is not None else ():
            changed_tree = _of_trial(tree, space, {**first, dimension.name: value})
            build(changed_tree, problems, check_files=False, complete=True)
    if made is not None and not problems:  # with the bounds of the sweep among its gates
        made = build(_judged(substituted(tree, space, first)), problems, check_files=False, complete=True)
    if made is not None and made.sweep is not None:
        problems += _endless(space, made.sweep)
    if made is None or problems:
        raise mistakes(problems)
    return SearchRecipe(root, tree, space, made)


def _endless(space: Sequence[Dimension], sweep: Sweep) -> Iterator[Problem]:
    """A problem for each range that a grid cannot try."""
    for d in space if sweep.sampler == "grid" else ():
        if not d.choices:
            low, high = d.ends()
            hint = f"write `{{from: {low}, to: {high}, step: …}}`, `{{choices: [{low}, {high}]}}`, or `sampler: tpe`"
            yield Problem(
                f"a grid tries every value, and from {low} to {high} there is no end of them", d.place, d.path, hint
            )


def _of_trial(tree: MapNode, space: Sequence[Dimension], values: Mapping[str, Any]) -> MapNode:
    """The tree of a trial, the bounds of the sweep among its gates."""
    made = _judged(substituted(tree, space, values))
    made.entries.pop("sweep", None)
    return made


def _judged(made: MapNode) -> MapNode:
    """The tree, changed in place: the bounds of the sweep are among its gates."""
    section = made.get("sweep")
    bounds = section.get("subject_to") if isinstance(section, MapNode) else None
    if isinstance(bounds, MapNode):
        gates = made.get("gates")
        given = dict(gates.entries) if isinstance(gates, MapNode) else {}
        entry = made.entries.get("gates")
        made.entries["gates"] = MapEntry(MapNode(given | bounds.entries, bounds.place), entry.key if entry else None)
    return made
