"""Shared by the bodies of the commands: output, progress, recipes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.escape import in_one_line, printable_json

if TYPE_CHECKING:
    from compress.progress.display import ShownProgress
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


def progress(quiet: bool) -> ShownProgress:
    """Progress on stderr, shown while its context is open; silent if ``quiet``."""
    from compress.progress.display import make_progress

    return make_progress(quiet, sys.stderr)


def load(path: Path, sets: Sequence[str]) -> Recipe:
    """Load a recipe with the overrides of ``--set``."""
    from compress.recipe import load_recipe

    return load_recipe(path, sets)


@contextlib.contextmanager
def annotated() -> Iterator[None]:
    """Context in which mistakes in a recipe are also shown at their places by GitHub, in a workflow of it."""
    from compress.cli import ci
    from compress.errors import RecipeError

    try:
        yield
    except RecipeError as error:
        if ci.on_github():
            sys.stderr.write("".join(f"{line}\n" for line in ci.github(ci.mistakes_of(error))))
        raise


def annotate_gates(gates: Sequence[Mapping[str, Any]]) -> None:
    """In a workflow of GitHub, show the gates that did not pass on its page."""
    from compress.cli import ci

    if ci.on_github():
        sys.stderr.write("".join(f"{line}\n" for line in ci.github_gates(gates)))
