"""Inputs that are given as the model reads them: the arguments of its forward by name, such as an image with its text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.data.batches import Batches
from compress.errors import DataError

if TYPE_CHECKING:
    import torch

_FIX = "stack what the model's processor makes of each sample"


def given_inputs(values: Mapping[str, torch.Tensor], samples: int | None = None, where: str = "data") -> Batches:
    """Samples of given inputs, unchanged; padding of ``input_ids`` is told by ``attention_mask``.

    Args:
        values: arguments of the model's forward by name, each with samples first. samples: use the first so many; None for all.
        where: names them in errors; its last part names the samples.

    Raises:
        DataError: they are no tensors, differ in the number of samples, or are fewer.
    """
    import torch

    if not values:
        raise DataError("holds no inputs", where=where, fix="give the arguments of the model's forward by name")
    if odd := next((name for name, value in values.items() if not isinstance(value, torch.Tensor)), None):
        raise DataError(f"`{odd}` is no tensor", where=where, fix=_FIX)
    check_counts({name: tuple(value.shape) for name, value in values.items()}, samples, where)
    read = {name: value.detach().to("cpu")[:samples] for name, value in values.items()}
    count = len(next(iter(read.values())))
    ids, mask = read.get("input_ids"), read.get("attention_mask")
    if ids is None or ids.ndim != 2:
        ids, mask = torch.arange(count)[:, None], None
    if mask is not None and (mask.shape != ids.shape or bool((mask != 0).all())):
        mask = None
    if mask is not None:
        del read["attention_mask"]  # it is made of the mask
    name = Path(where).name
    return Batches(
        ids,
        None if mask is None else mask != 0,
        tuple(f"{name}#{row}" for row in range(count)),
        targets=read.get("decoder_input_ids"),
        given=read,
    )


def check_counts(shapes: Mapping[str, tuple[int, ...]], samples: int | None, where: str) -> None:
    """Raise `DataError` where inputs of these shapes have no samples, differ in their number, or have fewer than asked for."""
    counts = {name: shape[0] if shape else 0 for name, shape in shapes.items()}
    first, count = next(iter(counts.items()))
    if odd := next((name for name in counts if counts[name] != count), None):
        raise DataError(f"`{first}` has {count} samples, `{odd}` has {counts[odd]}", where=where, fix=_FIX)
    if count < (samples or 1):
        raise DataError(f"holds {count} samples, {samples or 1} are asked for", where=where)
