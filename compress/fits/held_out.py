"""Samples that trials are measured on: of the calibration text, and no part of a calibration sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.data.kinds import holds_ids
from compress.errors import DataError
from compress.pipeline.datasets import draw

if TYPE_CHECKING:
    import torch

    from compress.pipeline.datasets import DataSets

#: Length of a run of token ids that two samples share only if they hold the same passage, as 13 words in GPT-3's check.
_RUN = 13
#: Samples that are drawn for each one to keep.
_DRAWN = 3


def other_samples(data: DataSets, ids: torch.Tensor, count: int) -> torch.Tensor | None:
    """Samples [count, length] that share no run of 13 ids with the calibration samples ``ids`` [samples, length].

    Texts are drawn from by another seed; of a file of token ids the rows after the calibration samples are taken.

    Returns:
        None where the text gives no such samples, or samples are padded.
    """
    recipe, section = data.recipe, data.recipe.data.calibration
    assert section is not None
    assert data.structure is not None
    by_row = bool(section.files) and holds_ids(section.files[0])
    wanted = len(ids) + count if by_row else _DRAWN * count
    try:
        drawn = draw(
            section.model_copy(update={"samples": wanted}),
            data.processor,
            lambda: data.documents("calibration"),
            seed=recipe.seed + 1,
            vocabulary=data.structure.config.get("vocab_size"),
            positions=data.positions,
        )
    except DataError:  # the text is too short
        return None
    if drawn.mask is not None:
        return None
    seen = {run for row in ids.tolist() for run in _runs(row)}
    others = [n for n, row in enumerate(drawn.ids.tolist()) if seen.isdisjoint(_runs(row))]
    return drawn.ids[others[:count]].contiguous() if len(others) >= count else None


def _runs(row: list[int]) -> list[tuple[int, ...]]:
    size = min(_RUN, len(row))
    return [tuple(row[i : i + size]) for i in range(len(row) - size + 1)]
