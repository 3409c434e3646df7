"""A quick start. Command lines of plain words need no typer, which imports pydantic to read an argument (0.1 s)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def plain(words: Sequence[str]) -> Callable[[], None] | None:
    """The body of ``passes``, ``runs`` or ``check`` without options; None for every other command line."""
    if any(word.startswith("-") or not word for word in words):
        return None
    match words:
        case ["passes", *name] if len(name) <= 1:
            from compress.cli.commands import listing

            return partial(listing.passes_, name[0] if name else None, json=False)
        case ["runs", *folder] if len(folder) <= 1:
            from compress.cli.commands import listing

            return partial(listing.runs, Path(*folder), json=False)
        case ["check", _, *_]:
            from compress.cli.commands import recipes

            paths = [Path(word) for word in words[1:]]
            return partial(recipes.check, paths, [], data=False, resolved=False, json=False, form=None)
    return None


def narrowed(app: typer.Typer, words: Sequence[str]) -> typer.Typer:
    """The app, with only the command that the first word names if it names one: typer builds all that are registered."""
    commands = app.registered_commands
    named = [one for one in commands if words and (one.name or getattr(one.callback, "__name__", "")) == words[0]]
    chosen = copy(app)
    chosen.registered_commands = named or commands
    return chosen
