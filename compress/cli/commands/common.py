"""Shared by the bodies of the commands: output, progress, recipes, and the place of an error in a recipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.escape import in_one_line, printable_json

if TYPE_CHECKING:
    from compress.progress import Progress
    from compress.recipe import Recipe


@dataclass(frozen=True)
class Code:
    """Options for checkpoints from elsewhere: ``--trust-remote-code``, ``--ignore-auto-map`` and ``--allow-links``."""

    trust: bool
    ignore: bool
    links: bool

    def options(self) -> dict[str, bool]:
        """The arguments of library functions."""
        return {"trust_remote_code": self.trust, "ignore_auto_map": self.ignore}

    def place(self, checkpoint: str) -> str | Path:
        """The checkpoint as library functions take it."""
        from compress.checkpoint.sidecars import with_links

        return with_links(checkpoint, self.links)


def print_json(data: Mapping[str, Any]) -> None:
    """Print one strict JSON document on stdout."""
    from compress.report import to_json

    sys.stdout.write(printable_json(to_json(data)) + "\n")


def say(text: str) -> None:
    """Print a line on stdout; control characters in names are escaped."""
    print(in_one_line(text))


def progress(quiet: bool) -> Progress:
    """Progress on stderr; silent if ``quiet``."""
    from compress.cli.progress import make_progress

    return make_progress(quiet, sys.stderr)


def load(path: Path, sets: Sequence[str]) -> Recipe:
    """Load a recipe with the overrides of ``--set``."""
    from compress.recipe import load_recipe

    return load_recipe(path, sets)


class Located:
    """Context in which an error of a pass or a metric is reported at the line of the recipe that caused it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from compress.errors import CompressError, PassError, RecipeError
        from compress.recipe import locate

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
