"""Settings of `prune_unstructured`."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.passes.base import PassSettings
from compress.passes.effort import Effort, EffortDefaults
from compress.settings import Fraction, PatternNM

#: Defaults by effort: `fast` is SparseGPT alone, `balanced` ALPS alone.
EFFORTS = EffortDefaults(
    fast={"method": "sparsegpt", "reconstruction_epochs": 0, "reconstruction_lr": 0.04, "allocation": "uniform"},
    balanced={"method": "alps", "reconstruction_epochs": 0, "reconstruction_lr": 0.015, "allocation": "uniform"},
    best={"method": "alps", "reconstruction_epochs": 15, "reconstruction_lr": 0.015, "allocation": "auto"},
)


class PruneUnstructuredSettings(PassSettings):
    """Settings of `prune_unstructured`."""

    efforts: ClassVar[EffortDefaults | None] = EFFORTS
    effort: Effort = EFFORTS.setting()
    method: Literal["magnitude", "wanda", "sparsegpt", "alps"] = Field(
        default_factory=EFFORTS.of("method"),
        description="How weights are chosen. `alps` (arXiv 2406.07831) keeps the most quality. `sparsegpt` (arXiv "
        "2301.00774) is a few times faster. `wanda` (arXiv 2306.11695) is faster still and worse. These read calibration "
        "data. `magnitude` removes the smallest weights, needs no data and is by far the worst.",
    )
    sparsity: Fraction | None = Field(
        default=None,
        description="Share of the weights to remove, such as 50%, of the linear layers and convolutions of blocks. The first "
        "convolution and depthwise ones stay unless `only` names them.",
    )
    pattern: PatternNM | None = Field(
        default=None,
        description="N:M sparsity (arXiv 2104.08378): keep N of every M weights along the input dimension, such as 2:4. The "
        "kernel of a convolution is the matrix [out, in x positions].",
    )
    scope: Literal["layer", "global"] = Field(
        default="layer",
        description="With `method: magnitude`: one threshold for each weight matrix (`layer`), or one for all of them "
        "(`global`).",
    )
    allocation: Literal["auto", "uniform", "owl", "kl"] = Field(
        default_factory=EFFORTS.of("allocation"),
        description="How the sparsity is distributed over the matrices. `uniform`: the same everywhere. `owl`: blocks with "
        "more outliers are pruned less (OWL, arXiv 2310.05175). `kl`: each matrix by the KL divergence of the model's "
        "predictions that its pruning causes, estimated from gradients with one block in memory; convolutions, and an "
        "encoder in front of a decoder, have the common sparsity. `auto`: `kl` where `sparsity` is given and the model "
        "predicts tokens, else `uniform`. The total stays the same. `owl` and `kl` read calibration data.",
    )
    reconstruction_epochs: int | float = Field(
        default_factory=EFFORTS.of("reconstruction_epochs"),
        ge=0,
        description="With calibration data: epochs of block reconstruction (BRECQ, arXiv 2102.05426), such as 5 or 0.5. "
        "Each pruned block is trained towards the original block's output; masks stay fixed. 0 for none. It takes most of "
        "the time, and lowers the loss on unseen text too.",
    )
    reconstruction_lr: float = Field(
        default_factory=EFFORTS.of("reconstruction_lr"),
        gt=0,
        lt=1,
        description="Learning rate of block reconstruction, relative to the size of each tensor's values.",
    )

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either `sparsity` or `pattern`")
        if self.pattern is not None and self.scope == "global":
            raise ValueError("`scope: global` goes with `sparsity`, not with `pattern`")
        if self.allocation in ("owl", "kl") and (self.method == "magnitude" or self.sparsity is None):
            raise ValueError("`allocation` goes with `sparsity` and with a method that reads calibration data")
        if self.method != "magnitude" and self.scope == "global":
            raise ValueError("`scope: global` goes with `method: magnitude`")
        return self
