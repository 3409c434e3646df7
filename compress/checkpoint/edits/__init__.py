"""Edits of structure, a file each: factors, residuals, shared parameters, projections, widths, windows of heads.

docs/format.md specifies all of them.

A file holds all that concerns its edit: a `spec.edits.EditKind` for headers, the function that gives a spec such edits, and
below a mark an `editing.ModelEdit` for models, which is copied into the modelling file of compact checkpoints. A new file
needs no other line. Importing this package loads no torch; the functions that compute import it.

`twin` makes the dense twin of a checkpoint.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from typing import Any

from compress.errors import CheckpointError
from compress.spec.edits import EDIT_KINDS
from compress.spec.spec import Edit, Spec, Tensor

__all__ = ["EDIT_KINDS", "MODULES", "first_without_twin", "from_json", "to_json", "with_aliases"]

_SHARED = ("editing", "base", "twin")
#: Names of the modules whose lower halves the modelling file holds, in the order of its text.
MODULES = ("editing", *sorted(name for _, name, _ in pkgutil.iter_modules(__path__) if name not in _SHARED))
for _name in MODULES:
    import_module(f"{__name__}.{_name}")


def to_json(edits: Iterable[Edit]) -> list[dict[str, Any]]:
    """JSON list for ``config.json``."""
    return [{"kind": e.kind, "module": e.module, "values": dict(e.values)} for e in edits]


def from_json(rows: Any, where: str) -> tuple[Edit, ...]:
    """Inverse of `to_json`. Raises `CheckpointError` for kinds that this version does not know and for damaged edits."""
    try:
        edits = tuple(Edit(str(row["kind"]), str(row["module"]), dict(row["values"])) for row in rows or ())
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"has damaged `edits`: {error!r}", where=where) from None
    for edit in edits:
        if edit.kind not in EDIT_KINDS:
            raise CheckpointError(
                f"has an edit that this version does not know: {edit.kind}",
                where=where,
                fix="update compress",
            )
        if not EDIT_KINDS[edit.kind].sound(edit.values):
            raise CheckpointError(f"has a damaged edit: {edit.kind} of {edit.module}", where=where)
    return edits


def with_aliases(spec: Spec, where: str) -> Spec:
    """Spec with aliases for the tensors that edits share. Raises `CheckpointError` if edits and tensors disagree."""
    aliases: dict[str, Tensor] = {}
    for edit in spec.structure.edits:
        EDIT_KINDS[edit.kind].check(edit, spec, where)
        aliases.update(EDIT_KINDS[edit.kind].aliases(edit, spec))
    return replace(spec, tensors={**spec.tensors, **aliases})


def first_without_twin(spec: Spec) -> Edit | None:
    """The first edit that no stock class can express in any way, None without any."""
    return next((edit for edit in spec.structure.edits if not EDIT_KINDS[edit.kind].has_twin), None)
