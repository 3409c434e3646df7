"""Settings of `share`."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.passes.base import PassSettings
from compress.passes.effort import Effort, EffortDefaults

BlockGroups = list[list[int]]


#: Rank of residuals: without them dropping as many blocks is better, see the benchmarks.
DEFAULT_RANK = 8


Arrangement = Literal["best", "sequence", "cycle", "nearest"]
#: Defaults by effort: `fast` tries nothing. Which arrangement wins differs by model, so the others try all.
EFFORTS = EffortDefaults(
    fast={"arrangement": "sequence"}, balanced={"arrangement": "best"}, best={"arrangement": "best"}
)


class ShareSettings(PassSettings):
    """Settings of `share`."""

    efforts: ClassVar[EffortDefaults | None] = EFFORTS
    effort: Effort = EFFORTS.setting()
    groups: int | BlockGroups | None = Field(
        default=None,
        description="Number of blocks to store; each is used by the same number of blocks. Or lists of block indices that "
        "share, such as [[1, 2], [3, 4]]; blocks in no list stay as they are.",
    )
    arrangement: Arrangement = Field(
        default_factory=EFFORTS.of("arrangement"),
        description="Which blocks share, if `groups` is a number. `sequence`: neighbours (0 1, 2 3). `cycle`: every n-th "
        "block (0 3, 1 4) (both in arXiv 2104.06022). `nearest`: the blocks whose outputs change least. `best`: the "
        "arrangement of these whose predictions on held-out calibration samples are nearest to the original's. "
        "Where a BERT becomes an ALBERT, `best` is `sequence`.",
    )
    parts: Literal["matrices", "attention", "mlp", "all"] = Field(
        default="matrices",
        description="What the blocks share: all weight matrices, the matrices of attention or of the MLP, or all tensors "
        "with norms and biases. A BERT whose neighbours share `all` becomes a stock ALBERT (arXiv 1909.11942).",
    )
    init: Literal["least_squares", "mean", "fisher", "first"] = Field(
        default="least_squares",
        description="The shared matrix. `least_squares`: the matrix of least output error over all blocks of the group, on "
        "calibration data. `mean`: their mean. `fisher`: their mean weighted by the Fisher information (arXiv 2111.09832). "
        "`first`: the matrix of the group's first block.",
    )
    align: bool = Field(
        default=True,
        description="Before sharing, permute neurons and heads of each block to match the group's first block (Git "
        "Re-Basin, arXiv 2209.04836). This changes no output.",
    )
    residual_rank: int | None = Field(
        default=None,
        ge=0,
        description="Rank of the low-rank residual that each block adds to a shared matrix (Relaxed Recursive Transformers, "
        "arXiv 2410.20672). It is fitted to the error of sharing, and `distill` trains it too. 0 for none. By default 8, or "
        "0 with `parts: all`.",
    )
    embeddings: Literal["tie", "factorize"] | None = Field(
        default=None,
        description="`tie`: input and output embeddings become one matrix, fitted to both on calibration data (arXiv "
        "1608.05859). `factorize`: embeddings become two factors of rank `embedding_rank`, fitted on calibration data "
        "(ALBERT, arXiv 1909.11942); an OPT stays a stock model.",
    )
    embedding_rank: int | None = Field(default=None, ge=1, description="With `embeddings: factorize`: the rank.")
    codebook_bits: int | None = Field(
        default=None,
        ge=2,
        le=8,
        description="Each matrix gets a codebook of 2 to the power of this many values (Deep Compression, arXiv "
        "1510.00149). Values come from k-means weighted by the Hessian's diagonal (SqueezeLLM, arXiv 2306.07629); later "
        "columns compensate for rounding errors. Weights are stored as indices of this many bits and cannot be trained "
        "afterwards.",
    )

    @property
    def rank(self) -> int:
        """Rank of residuals."""
        if self.residual_rank is not None:
            return self.residual_rank
        return 0 if self.groups is None or self.parts == "all" else DEFAULT_RANK

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.groups is None and self.embeddings is None and self.codebook_bits is None:
            raise ValueError("give `groups`, `embeddings` or `codebook_bits`")
        if (self.embeddings == "factorize") != (self.embedding_rank is not None):
            raise ValueError("`embeddings: factorize` and `embedding_rank` go together")
        if self.groups is None and self.residual_rank:
            raise ValueError("`residual_rank` goes with `groups`")
        if self.groups is None:
            return self
        if isinstance(self.groups, int):
            if self.groups < 1:
                raise ValueError("`groups` is at least 1")
            return self
        numbers = [i for group in self.groups for i in group]
        if len(set(numbers)) != len(numbers) or min(numbers, default=-1) < 0:
            raise ValueError("`groups` names each block at most once, by its number from 0")
        if any(len(group) < 2 for group in self.groups):
            raise ValueError("each of `groups` has two blocks or more")
        if any(sorted(group) != group for group in self.groups):
            raise ValueError("each of `groups` is in ascending order")
        return self
