"""The order of passes: a pass must accept the storage that earlier passes leave, as both declare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress import passes
from compress.passes.base import EDITED, EDITS, Storage, accepted_values
from compress.recipe.entries import PassEntry


@dataclass(frozen=True)
class Misplaced:
    """A pass that cannot read the storage of an earlier pass."""

    index: int
    message: str
    hint: str


def misplaced(entries: Sequence[tuple[int, PassEntry]]) -> list[Misplaced]:
    """Find the passes in illegal places, given (index in the recipe, entry).

    A pass must accept all storage that earlier passes left. Floats and integers of earlier passes stay only if it yields
    them too; edits of structure stay. The storage of the input checkpoint is checked by `plan`.
    """
    left: dict[Storage, tuple[int, str]] = {}  # storage ▶ the pass that left it
    wrong = []
    for index, entry in entries:
        instance = passes.get(entry.name)
        for storage in [storage for storage in left if storage not in instance.accepts]:
            earlier, name = left[storage]
            does = "trains and accepts" if instance.mode == "train" else "accepts"
            values = accepted_values(instance)
            message = f"{entry.name} {does} {values} weights, but {name} (passes.{earlier}) leaves {storage}s"
            if storage in EDITED:
                message = f"{entry.name} cannot change what {name} (passes.{earlier}) leaves: a module {EDITS[storage]}"
            fix = f"put {entry.name} before {name}" if entry.name != name else "use it once"
            wrong.append(Misplaced(index, message, fix))
            del left[storage]  # one mistake, not one for each pass that follows
        yields = instance.output_storage(entry.settings)
        left = {storage: pass_ for storage, pass_ in left.items() if storage in EDITED | yields}
        for storage in yields:
            left.setdefault(storage, (index, entry.name))
    return wrong
