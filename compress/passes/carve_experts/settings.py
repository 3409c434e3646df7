"""Settings of `carve_experts`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from compress.passes.base import PassSettings
from compress.passes.effort import Effort, EffortDefaults
from compress.settings import Fraction, parse_share


def _up_to_all(value: Any) -> float:
    whole = value == "100%" or (isinstance(value, (int, float)) and not isinstance(value, bool) and value == 1)
    return 1.0 if whole else parse_share(value)


ActiveShare = Annotated[
    float,
    BeforeValidator(_up_to_all),
    WithJsonSchema({"type": ["number", "string"], "examples": ["50%", 0.5, "100%"]}),
]


#: Defaults by effort: `fast` trains nothing.
EFFORTS = EffortDefaults(
    fast={"repair": "least_squares", "tune_epochs": 1},
    balanced={"repair": "tune", "tune_epochs": 5},
    best={"repair": "tune", "tune_epochs": 10},
)


class CarveExpertsSettings(PassSettings):
    """Settings of `carve_experts`. ``only`` and ``skip`` name MLPs; those that are left out stay dense."""

    efforts: ClassVar[EffortDefaults | None] = EFFORTS
    effort: Effort = EFFORTS.setting()
    active: ActiveShare = Field(
        default=0.5,
        description="Share of each MLP's neurons that a token uses. With `100%` the result computes what the model did.",
    )
    shared: Fraction = Field(
        default=0.25, description="Share of the neurons that every token uses: those that are hardest to do without."
    )
    experts: int = Field(
        default=16,
        ge=2,
        description="Number of experts that the other neurons are divided into. Their size is a multiple of 8; what is left "
        "over joins the shared neurons. More and smaller experts lose less and run slower.",
    )
    multiple_of: int | None = Field(
        default=None,
        ge=1,
        description="The size of an expert is also a multiple of this. By default what later passes of the recipe need: the "
        "M of a pattern N:M, and the groups of mxfp4, nvfp4 and `group_size`.",
    )
    router: Literal["linear"] = Field(
        default="linear",
        description="How experts are chosen for a token. `linear`: a matrix that learns each expert's share of the outputs.",
    )
    repair: Literal["none", "least_squares", "tune"] = Field(
        default_factory=EFFORTS.of("repair"),
        description="How the weights make up for what a token no longer uses. `least_squares`: solve for the down projections. "
        "`tune`: do that, then train each block towards the original block's output.",
    )
    tune_epochs: int = Field(
        default_factory=EFFORTS.of("tune_epochs"),
        ge=1,
        description="With `repair: tune`: epochs over the calibration data.",
    )
    tune_lr: float = Field(
        default=0.04, gt=0, lt=1, description="Learning rate of tuning, relative to the size of each tensor's values."
    )
