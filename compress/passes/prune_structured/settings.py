"""Settings of `prune_structured`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from compress.passes.base import PassSettings
from compress.settings import Amount, ByteSize, Fraction, parse_amount


def _layers(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        if not value or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
            raise ValueError("expected a list of block numbers from 0 up")
        if len(set(value)) != len(value):
            raise ValueError("a block is named twice")
        return tuple(sorted(value))
    return parse_amount(value)


Layers = Annotated[
    tuple[int, ...] | float | int,
    BeforeValidator(_layers),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": ["number", "string"]},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            ],
            "examples": [2, "25%", [3, 4]],
        }
    ),
]


class PruneStructuredSettings(PassSettings):
    """Settings of `prune_structured`."""

    layers: Layers | None = Field(
        default=None,
        description="Blocks to remove: a count, a share, or a list of block numbers from 0. By count, `layer_importance` tells "
        "which.",
    )
    mlp: Amount | None = Field(
        default=None, description="Neurons to remove from every MLP (of every expert): a share or a count."
    )
    allocation: Literal["uniform", "kl"] = Field(
        default="uniform",
        description="`even`: every MLP loses as many neurons, and the result is a stock model. `uneven`: as many in all, but "
        "each block as many as costs the model's output least, measured by gradients on 32 samples with the whole model in "
        "memory; needs `store: compact`, and no stock model is its equal.",
    )
    heads: Amount | None = Field(
        default=None,
        description="Query heads to remove from every block: a share or a count. They go within their groups where every "
        "group of shared keys and values can lose the same number, else whole groups go.",
    )
    keep_kv_heads: int | None = Field(
        default=None,
        ge=1,
        description="Number of KV heads to keep in every block; it divides theirs. Neighbouring heads are aligned on "
        "calibration data, then averaged (arXiv 2412.20677). With `importance: magnitude` they are averaged as they are.",
    )
    hidden: Amount | None = Field(
        default=None, description="Hidden channels to remove (families with RMSNorm): a share or a count."
    )
    experts: Amount | None = Field(
        default=None, description="Experts to remove from every block that has some: a share or a count."
    )
    keep_parameters: Fraction | None = Field(
        default=None,
        description="Instead of amounts: the share of the model's parameters to keep, such as 60%. Shapes that do (fewer "
        "blocks, heads, neurons) are tried on calibration data, and the one that costs least is taken.",
    )
    max_bytes: ByteSize | None = Field(
        default=None, description="Likewise the most bytes of weights, stored densely, such as 500MB."
    )
    max_latency_ratio: Fraction | None = Field(
        default=None,
        description="Likewise the most time that reading a prompt of 256 tokens may take, as a share of the original's, such "
        "as 70%. Shapes are measured beside it on this machine, with random weights, which no plan and no rerun can foretell; "
        "both targets hold where a size is given too.",
    )
    multiple_of: int = Field(
        default=1,
        ge=1,
        description="What is kept of `mlp` and `hidden` is rounded to a multiple of this (with experts: and of 8).",
    )
    importance: Literal["obs", "activation", "taylor", "magnitude"] = Field(
        default="obs",
        description="Which neurons and heads go. `loss`: one after another the one whose removal costs the outputs least when "
        "all others make up for it (Optimal Brain Surgeon). `activation`: those that are least active (Minitron). "
        "`taylor`: those that change the model's loss least to first order, by gradients (the whole model is in memory). "
        "`magnitude`: those of the smallest weights; needs no data.",
    )
    layer_importance: Literal["kl", "block_influence"] = Field(
        default="kl",
        description="Which blocks go. `loss`: one after another the one without which the calibration text costs least (the "
        "whole model is in memory). `influence`: those that change their input least (ShortGPT), in one pass over it.",
    )
    compensation: Literal["reconstruction", "least_squares", "none"] = Field(
        default="reconstruction",
        description="What makes up for removed units. `least_squares`: the weights that read the survivors are solved for "
        "anew. `tune`: that, and then each block is moved by gradient towards the output of the original's. Both read "
        "calibration data.",
    )
    reconstruction_epochs: int = Field(
        default=10, ge=1, description="With `compensation: reconstruction`, passes over the calibration data."
    )
    reconstruction_lr: float = Field(
        default=0.04, gt=0, lt=1, description="Step of the tuning, relative to the size of each tensor's values."
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        amounts = [kind for kind in KINDS if getattr(self, kind) is not None]
        targets = [key for key in TARGETS if getattr(self, key) is not None]
        if amounts and targets:
            raise ValueError(f"give amounts or a target, not `{amounts[0]}` and `{targets[0]}`")
        if not amounts and not targets:
            raise ValueError(f"give what to remove: {', '.join(f'`{key}`' for key in (*KINDS, *TARGETS))}")
        if self.heads is not None and self.keep_kv_heads is not None:
            raise ValueError("`heads` removes heads and `keep_kv_heads` merges them: give one, or use two passes")
        if self.allocation == "kl" and self.mlp is None:
            raise ValueError("`allocation: kl` goes with `mlp`, which says how many neurons go in all")
        if self.allocation == "kl" and self.importance not in ("obs", "activation"):
            raise ValueError("`allocation: kl` tries widths on calibration data: set `importance: obs` or `activation`")
        if targets and self.importance == "magnitude":
            raise ValueError(f"`{targets[0]}` tries shapes on calibration data: leave out `importance: magnitude`")
        return self

    @property
    def searched(self) -> bool:
        """Whether the shape is searched for a target."""
        return any(getattr(self, key) is not None for key in TARGETS)


KINDS = ("layers", "experts", "hidden", "heads", "keep_kv_heads", "mlp")
TARGETS = ("keep_parameters", "max_bytes", "max_latency_ratio")
