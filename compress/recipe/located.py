"""The place in a recipe of an error that came after loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.errors import EXIT_BAD_INPUT, CompressError, PassError, RecipeError
from compress.recipe.problems import find_place, locate

if TYPE_CHECKING:
    from compress.recipe.model import Recipe


_LISTS = ("passes", "evaluate")


class Located:
    """Context in which an error of a key, pass or metric is reported at the line of the recipe that caused it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, CompressError) or error.exit_status != EXIT_BAD_INPUT or not error.where:
            return
        where, _, inside = error.where.partition(": ")
        path = ("output",) if error.where == self.recipe.output else self._path(where)
        if path is None:
            return
        in_file = self.recipe.source is not None and find_place(self.recipe.source.root, path) is not None
        if path[0] not in _LISTS and not in_file:
            return
        if isinstance(error, PassError) and error.key:
            path = (*path, error.key)
        what = f"{inside or self.recipe.output}: {error.what}" if inside or path == ("output",) else error.what
        problem = locate(self.recipe.source, path, CompressError(what, fix=error.fix))
        raise RecipeError([problem.render()], mistakes=[problem.mistake()]) from error

    def _path(self, where: str) -> tuple[str | int, ...] | None:
        """The keys that an error names; None where it names something else."""
        first, *rest = where.split(".")
        if first in ("data", "gates", "log", "sweep") and rest:
            return (first, *(int(part) if first == "sweep" and part.isdigit() else part for part in rest))
        if first not in ("passes", "evaluate") or not rest:
            return None
        if not rest[0].isdigit():  # a metric by its name alone
            entries = [entry.name for entry in self.recipe.evaluate or ()]
            if rest[0] not in entries:
                return None
            rest = [str(entries.index(rest[0])), *rest]
        return (first, int(rest[0]), *rest[1:])
