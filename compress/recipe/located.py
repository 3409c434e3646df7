"""The place in a recipe of an error that came after loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, PassError, RecipeError
from compress.recipe.problems import locate

if TYPE_CHECKING:
    from compress.recipe.model import Recipe


class Located:
    """Context in which an error of a pass or a metric is reported at the line of the recipe that caused it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, CompressError) or not (error.where or "").startswith(("passes.", "evaluate.")):
            return
        first, *rest = (error.where or "").split(".")
        if not rest[0].isdigit():  # a metric by its name alone
            entries = [entry.name for entry in self.recipe.evaluate or ()]
            if rest[0] not in entries:
                return
            rest = [str(entries.index(rest[0])), *rest]
        path: tuple[str | int, ...] = (first, int(rest[0]), *rest[1:])
        if isinstance(error, PassError) and error.key:
            path = (*path, error.key)
        where, error.where = error.where, None
        if text := locate(self.recipe.source, path, error):
            raise RecipeError([text]) from error
        error.where = where
