"""Rows of reports on blocks that were changed."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class MatrixDetails(TypedDict, total=False):
    """One matrix of a block that was changed.

    Attributes:
        error: relative error of its outputs; None if it cannot be measured. seconds: of solving.
        sparsity, format, rank: of the result, by pass. kept, of: units that it still reads, and read before.
    """

    error: float | None
    seconds: float
    sparsity: float
    format: str
    rank: int
    kept: int
    of: int


class ReconstructionDetails(TypedDict):
    """Reconstruction of a block: relative output error on held-out samples before and after. ``kept``: it helped."""

    before: float
    after: float
    rate: float
    steps: int
    kept: bool
    seconds: float


class GapDetails(TypedDict):
    """Ridge regression in front of removed blocks.

    Attributes:
        matrix: the last one of the block. before, after: squared difference to the original's hidden states behind the gap,
            over their variance.
    """

    matrix: str
    before: float
    after: float


class ExpertCounts(TypedDict):
    """Calibration tokens of a block, and how many of them reached each expert, by the expert's name."""

    tokens: int
    reached: dict[str, int]


class BlockDetails(TypedDict):
    """One block that was changed.

    Attributes:
        tensors: its matrices by name. gap: what it takes over of removed blocks. tuning: its reconstruction. experts: tokens
            by expert.
        kept, saliency, importance, outliers, divergence, energies, router_mass: results that a pass reads and removes.
    """

    block: int
    seconds: NotRequired[float]
    tensors: NotRequired[dict[str, MatrixDetails]]
    gap: NotRequired[GapDetails]
    tuning: NotRequired[ReconstructionDetails]
    experts: NotRequired[ExpertCounts]
    kept: NotRequired[Any]
    saliency: NotRequired[Any]
    importance: NotRequired[Any]
    outliers: NotRequired[Any]
    divergence: NotRequired[Any]
    energies: NotRequired[Any]
    router_mass: NotRequired[float]
