"""Helpers for the headers of edits. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from compress.errors import CheckpointError
from compress.spec.spec import DENSE, Edit, Spec, Tensor


def alias(source: Tensor, name: str) -> Tensor:
    """Alias of ``source`` under another name."""
    return replace(source, name=name, alias_of=source.name, kept=None, storage=DENSE, quant_format=None)


def with_edits(spec: Spec, edits: Iterable[Edit], tensors: Mapping[str, Tensor]) -> Spec:
    """Spec with other tensors, and with edits after those it has."""
    structure = replace(spec.structure, edits=(*spec.structure.edits, *edits))
    return replace(spec, structure=structure, tensors=tensors)


def check_matrix(spec: Spec, name: str, text: str, fits: Callable[[tuple[int, ...]], bool], where: str) -> None:
    """Check that a matrix is there and that its shape fits. ``text``: what the edit says of it. Raises `CheckpointError`."""
    shape = spec.tensors[name].shape if name in spec.tensors else None
    if shape is None or len(shape) != 2 or not fits(shape):
        actual = "is missing" if shape is None else f"is {list(shape)}"
        raise CheckpointError(f"config and weights disagree: {name}, {text}, {actual}", where=where)


def check_low_rank(spec: Spec, down: str, up: str, rank: int, where: str) -> None:
    """Check that two matrices [r, I] and [O, r] are there and have the rank. Raises `CheckpointError`."""
    check_matrix(spec, down, f"of rank {rank}", lambda shape: shape[0] == rank, where)
    check_matrix(spec, up, f"of rank {rank}", lambda shape: shape[1] == rank, where)
