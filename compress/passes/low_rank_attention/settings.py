"""Settings of `low_rank_attention`."""

from __future__ import annotations

from pydantic import Field

from compress.passes.base import PassSettings


class LowRankAttentionSettings(PassSettings):
    """Settings of `low_rank_attention`."""

    rank: int = Field(
        ge=1,
        description="Rows that keys and values are projected to. A text of no more tokens is computed as before.",
    )
    positions: int | None = Field(
        default=None, ge=2, description="Longest text, in tokens. By default as many as the model has positions."
    )
    iterations: int = Field(
        default=20,
        ge=0,
        description="Steps of conjugate gradients by which the projection of values is fitted to the original's outputs on "
        "calibration data. 0: means of neighbouring tokens, which need no data.",
    )
