"""Sizes that a recipe and the headers of its model tell: of calibration data, and the lengths of a plan's cache. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.architectures.cache import plan_lengths
from compress.architectures.model_map import model_map
from compress.checkpoint.headers import read_header
from compress.data.kinds import FIELD, holds_ids
from compress.errors import CompressError
from compress.files import expanded
from compress.passes.work import CalibrationSize
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.recipe.model import Recipe


def calibration_size(recipe: Recipe) -> CalibrationSize | None:
    """The size of a recipe's calibration data; None without such, and where only reading them tells."""
    section = recipe.data.calibration
    if section is None or not section.files or section.mode != "packed":
        return None
    samples, length = section.samples, section.length
    if holds_ids(section.files[0]):
        shape = _ids_shape(expanded(section.files[0]), section.field)
        if shape is None:
            return None
        samples = min(samples or shape[0], shape[0])
        length = min(length or shape[1], shape[1])
    return CalibrationSize(samples, length) if samples is not None and length is not None else None


def _ids_shape(file: Path, field: str) -> tuple[int, int] | None:
    """Samples and length of token ids in a ``.safetensors`` file, as its header has them; None of any other file."""
    if file.suffix.lower() != ".safetensors":
        return None
    try:
        entries = read_header(file).entries
    except CompressError:
        return None
    entry = next(iter(entries.values())) if field == FIELD and len(entries) == 1 else entries.get(field)
    return (entry.shape[0], entry.shape[1]) if entry is not None and len(entry.shape) == 2 else None


def cache_lengths(recipe: Recipe, spec: Spec) -> tuple[int, ...]:
    """Lengths at which the plan shows the cache: those of the recipe's latency, else some up to the trained positions.

    Raises:
        CompressError: a prompt would be longer than the texts that the model was made for.
    """
    positions, settings = model_map(spec).trained_positions, recipe.settings_of("latency")
    asked: tuple[int, ...] = getattr(settings, "lengths", None) or ()
    if positions is not None and asked and asked[-1] > positions:
        index = next(i for i, entry in enumerate(recipe.evaluate or ()) if entry.name == "latency")
        raise CompressError(
            f"a prompt of {asked[-1]} tokens is beyond the model's {positions} positions",
            where=f"evaluate.{index}.latency.lengths",
            fix=f"set lengths of at most {positions}",
        )
    return asked or plan_lengths(positions)
