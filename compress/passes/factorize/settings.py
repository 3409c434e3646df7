"""Settings of `factorize`."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.passes.base import PassSettings
from compress.passes.effort import Effort, EffortDefaults
from compress.settings import Fraction

#: Defaults by effort: `fast` trains nothing and measures no divergence.
EFFORTS = EffortDefaults(
    fast={"allocation": "uniform", "reconstruction_epochs": 0},
    balanced={"allocation": "kl", "reconstruction_epochs": 3},
    best={"allocation": "kl", "reconstruction_epochs": 5},
)


class FactorizeSettings(PassSettings):
    """Settings of `factorize`."""

    efforts: ClassVar[EffortDefaults | None] = EFFORTS
    effort: Effort = EFFORTS.setting()
    keep_parameters: Fraction | None = Field(
        default=None,
        description="Share of the chosen matrices' parameters that their factors have in total. The factors are those of least "
        "output error on calibration data (SVD-LLM, arXiv 2403.07378).",
    )
    rank: int | None = Field(
        default=None, ge=1, description="Instead of `keep_parameters`: the same rank for every chosen matrix."
    )
    multiple_of: int | None = Field(
        default=None,
        ge=1,
        description="With `keep_parameters`: ranks are multiples of this. By default what later passes of the recipe need: the "
        "M of a pattern N:M, and the groups of mxfp4, nvfp4 and `group_size`.",
    )
    allocation: Literal["kl", "uniform"] = Field(
        default_factory=EFFORTS.of("allocation"),
        description="With `keep_parameters`: how ranks are distributed. `kl`: each matrix gets the rank of least KL "
        "divergence of the model's predictions, estimated from gradients with one block in memory; some matrices may "
        "stay whole. `uniform`: every matrix keeps the same share.",
    )
    reconstruction_epochs: int = Field(
        default_factory=EFFORTS.of("reconstruction_epochs"),
        ge=0,
        description="Epochs of block reconstruction (BRECQ, arXiv 2102.05426): each factorised block is trained towards the "
        "original block's output. 0 for none.",
    )
    reconstruction_lr: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="Learning rate of block reconstruction, relative to the size of each tensor's values.",
    )

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if (self.keep_parameters is None) == (self.rank is None):
            raise ValueError("give either `keep_parameters` or `rank`")
        return self

    @property
    def by_divergence(self) -> bool:
        """Whether ranks are chosen by measured KL divergences."""
        return self.allocation == "kl" and self.rank is None
