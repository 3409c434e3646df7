"""Settings of `latent_attention`."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.architectures.conversions.latent import TARGETS
from compress.passes.base import PassSettings
from compress.passes.effort import Effort, EffortDefaults
from compress.settings import Fraction

#: Defaults by effort: `fast` trains nothing.
EFFORTS = EffortDefaults(
    fast={"repair": "none", "tune_epochs": 1},
    balanced={"repair": "tune", "tune_epochs": 3},
    best={"repair": "tune", "tune_epochs": 5},
)


class LatentAttentionSettings(PassSettings):
    """Settings of `latent_attention`."""

    efforts: ClassVar[EffortDefaults | None] = EFFORTS
    effort: Effort = EFFORTS.setting()
    max_cache: Fraction | None = Field(
        default=None,
        description="Largest share of the original's numbers per token that is cached. Trials on calibration data divide them "
        "between keys and values.",
    )
    keys: int | None = Field(
        default=None,
        ge=2,
        description="Instead of `max_cache`: cached numbers per token and block of the rotary key, an even number. By default "
        "as many as the keys have.",
    )
    values: int | None = Field(
        default=None,
        ge=1,
        description="Instead of `max_cache`: cached numbers per token and block of the values. One more is constant. By "
        "default as many as the values have.",
    )
    target: str | None = Field(
        default=None,
        description=f"Model type of the result: {' or '.join(TARGETS)}, which compute the same. By default the first.",
    )
    repair: Literal["none", "tune"] = Field(
        default_factory=EFFORTS.of("repair"),
        description="`tune` trains each block towards the original block's output on the calibration data; `none` leaves the "
        "weights as the components give them. `distill` after the pass repairs more.",
    )
    tune_epochs: int = Field(
        default_factory=EFFORTS.of("tune_epochs"),
        ge=1,
        description="Passes over the calibration data of `repair: tune`.",
    )
    tune_rate: float = Field(
        default=0.04,
        gt=0,
        le=1,
        description="Adam's step of `repair: tune`, relative to the root mean square of each tensor.",
    )

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.max_cache is not None and (self.keys is not None or self.values is not None):
            raise ValueError("give `max_cache`, or `keys` and `values`, not both")
        if self.max_cache is None and self.keys is None and self.values is None:
            raise ValueError("say how much is cached: set `max_cache`, such as 75%, or `keys` and `values`")
        if self.target is not None and self.target not in TARGETS:
            raise ValueError(f"there is no target `{self.target}`; set {' or '.join(TARGETS)}")
        if self.keys is not None and self.keys % 2:
            raise ValueError("`keys` must be even: rotary positions turn numbers in pairs")
        return self
