"""The passes: a static table, extended by entry points of the group ``compress.passes``."""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module, metadata
from typing import Any

from compress.errors import CompressError
from compress.passes.base import Pass

#: name in recipes ▶ module:class
TABLE = {
    "cast": "compress.passes.cast.cast:Cast",
    "distill": "compress.passes.distill.distill:Distill",
    "factorize": "compress.passes.factorize.factorize:Factorize",
    "prune_structured": "compress.passes.prune_structured.prune_structured:PruneStructured",
    "prune_unstructured": "compress.passes.prune_unstructured.prune_unstructured:PruneUnstructured",
    "share": "compress.passes.share.share:Share",
}


@cache
def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group="compress.passes")}


def names() -> list[str]:
    """Names of all passes, ours first."""
    return [*TABLE, *sorted(_entry_points().keys() - TABLE.keys())]


@cache
def get(name: str) -> Pass[Any]:
    """The pass of that name. Raises `CompressError` with a suggestion where there is none."""
    if name in TABLE:
        module, _, attribute = TABLE[name].partition(":")
        found = getattr(import_module(module), attribute)
    elif name in _entry_points():
        found = _entry_points()[name].load()
    else:
        close = difflib.get_close_matches(name, names(), n=1)
        raise CompressError(
            f"no pass is called `{name}`",
            fix=f"did you mean `{close[0]}`?" if close else f"there are: {', '.join(names())}",
        )
    instance: Pass[Any] = found()
    return instance
