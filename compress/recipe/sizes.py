"""Sizes that a recipe and the headers of its model tell: of its data, and the lengths of a plan's cache. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING

from compress.architectures.cache import plan_lengths
from compress.architectures.model_map import model_map
from compress.checkpoint.headers import read_header
from compress.data.kinds import FIELD, holds_ids
from compress.errors import CompressError
from compress.files import expanded
from compress.passes.work import DataSizes, SampleSize
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.recipe.data import TrainingData
    from compress.recipe.model import Recipe

#: Bytes of English that a token has for each bit of the vocabulary's size, less a constant; seen from 4,096 to 49,152 tokens.
_BYTES_PER_BIT, _BYTES_LESS = 0.36, 1.3


def data_sizes(recipe: Recipe, spec: Spec) -> DataSizes:
    """The sizes of a recipe's calibration and training data. ``spec``: headers of its model."""
    training = recipe.data.training
    return DataSizes(_calibration_size(recipe), None if training is None else _training_size(training, spec), spec)


def _calibration_size(recipe: Recipe) -> SampleSize | None:
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
    return SampleSize(samples, length) if samples is not None and length is not None else None


def _training_size(section: TrainingData, spec: Spec) -> SampleSize | None:
    if not section.files or section.mode != "packed":
        return None
    if holds_ids(section.files[0]):
        shape = _ids_shape(expanded(section.files[0]), section.field)
        return None if shape is None else SampleSize(shape[0], min(section.length or shape[1], shape[1]))
    assert section.length is not None
    return SampleSize(int(text_tokens(text_bytes(section.files), spec)) // section.length, section.length)


def text_bytes(files: Sequence[str]) -> int:
    """Bytes of text files, as they are on the disk; of token ids none, and none of files that are missing."""
    paths = [expanded(file) for file in files if not holds_ids(file)]
    return sum(path.stat().st_size for path in paths if path.is_file())


def text_tokens(count: int, spec: Spec) -> float:
    """About how many tokens so many bytes of text are; a larger vocabulary has longer tokens."""
    vocabulary = int(spec.structure.config.get("vocab_size") or 1 << 15)
    return count / max(1.0, _BYTES_PER_BIT * log2(max(2, vocabulary)) - _BYTES_LESS)


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
