"""Settings of `prune_structured`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from compress.passes.base import InputMultiple, PassSettings
from compress.passes.effort import Effort, EffortDefaults
from compress.settings import Amount, ByteSize, Fraction, expected, parse_amount


def _layers(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        if not value or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
            raise ValueError("expected a list of block numbers from 0 up")
        if len(set(value)) != len(value):
            raise ValueError("a block is named twice")
        return tuple(sorted(value))
    try:
        return parse_amount(value)
    except PydanticCustomError:
        raise expected("a count such as 2, a share such as 25%, or a list of block numbers", value) from None


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


#: Defaults by effort: `fast` trains nothing.
EFFORTS = EffortDefaults(
    fast={"compensation": "least_squares", "reconstruction_epochs": 1, "reconstruction_target": "outputs"},
    balanced={"compensation": "reconstruction", "reconstruction_epochs": 5, "reconstruction_target": "outputs"},
    best={"compensation": "reconstruction", "reconstruction_epochs": 10, "reconstruction_target": "predictions"},
)


class PruneStructuredSettings(PassSettings):
    """Settings of `prune_structured`."""

    efforts: ClassVar[EffortDefaults | None] = EFFORTS
    effort: Effort = EFFORTS.setting()

    layers: Layers | None = Field(
        default=None,
        description="Blocks to remove: a count, a share, or a list of block indices from 0. With a count or share, "
        "`layer_importance` chooses them.",
    )
    mlp: Amount | None = Field(
        default=None,
        description="Neurons to remove from every MLP (with experts, from every expert): a share or a count.",
    )
    allocation: Literal["uniform", "kl"] = Field(
        default="uniform",
        description="How the removed neurons are distributed over the MLPs. `uniform`: every MLP loses the same number, and "
        "the result is a stock model. `kl`: the total is the same, and each MLP loses what costs the least KL divergence of "
        "the model's predictions. The divergence is estimated from gradients on 32 samples, with one block in memory. "
        "The widths then differ, so `kl` needs `store: compact`.",
    )
    heads: Amount | None = Field(
        default=None,
        description="Query heads to remove from every block: a share or a count. If every group of shared keys and values "
        "can lose the same number, heads go within the groups; otherwise whole groups go.",
    )
    kv_heads: Amount | None = Field(
        default=None,
        description="KV heads to remove from every block, with the query heads that read them: a share or a count.",
    )
    keep_kv_heads: int | None = Field(
        default=None,
        ge=1,
        description="Number of KV heads to keep in every block; it divides their number. Neighbouring heads are aligned on "
        "calibration data, then averaged (arXiv 2412.20677). With `importance: magnitude` they are averaged without "
        "alignment.",
    )
    hidden: Amount | None = Field(
        default=None, description="Hidden channels to remove: a share or a count. For families with RMSNorm."
    )
    experts: Amount | None = Field(
        default=None,
        description="Experts to remove from every block with experts: a share or a count. Their saliency is that of REAP "
        "(arXiv 2510.13999).",
    )
    active_experts: Amount | None = Field(
        default=None,
        description="Number of experts that each token is sent to from now on: a count, or a share of today's number. Where "
        "the family does not divide the weights of a token's experts by their sum, the down projections grow by what the "
        "tokens lose, measured on calibration data by block.",
    )
    keep_parameters: Fraction | None = Field(
        default=None,
        description="Target instead of amounts: share of the model's parameters to keep, such as 60%. Shapes that meet it "
        "(fewer blocks, heads, neurons) are tried on calibration data; the one whose predictions are nearest to the "
        "original's is taken.",
    )
    max_bytes: ByteSize | None = Field(
        default=None,
        description="Target instead of amounts: most bytes of dense weights, such as 500MB. Shapes are tried as with "
        "`keep_parameters`.",
    )
    max_latency_ratio: Fraction | None = Field(
        default=None,
        description="Target instead of amounts: largest ratio to the original's time for a prompt of 256 tokens, such as "
        "70%. Shapes with random weights are timed beside it on this machine; a plan cannot predict the choice, nor does a "
        "rerun repeat it. If a size target is given too, both hold.",
    )
    multiple_of: int | None = Field(
        default=None,
        ge=1,
        description="Round the number of kept neurons (`mlp`) and channels (`hidden`) to a multiple of this; with experts "
        "also of 8. By default what later passes of the recipe need: the M of a pattern N:M, and the groups of mxfp4, nvfp4 "
        "and `group_size`.",
    )
    preferred_multiple: int | None = Field(
        default=None,
        ge=1,
        description="Round to a multiple of this too, or of the largest of its halves that moves the number by 6 % at most. "
        "By default the groups of 64 that later casts to less than 8 bits use where they can.",
    )
    importance: Literal["obs", "activation", "taylor", "magnitude"] = Field(
        default="obs",
        description="Which neurons and heads are removed. `obs`: greedily the unit whose removal, after the others "
        "compensate, raises the layer's output error least (Optimal Brain Surgeon in groups, as in ZipLM, arXiv "
        "2302.04089). `activation`: the units with the smallest activations (Minitron, arXiv 2407.14679). `taylor`: the "
        "units that change the model's loss least, to first order (arXiv 1906.10771); gradients need the whole model in "
        "memory. `magnitude`: the units with the smallest weights; needs no data.",
    )
    layer_importance: Literal["kl", "block_influence"] = Field(
        default="kl",
        description="Which blocks are removed. `kl`: greedily the block without which the KL divergence of the model's "
        "predictions is least (like SLEB, arXiv 2402.09025); models without a head are judged by their last hidden states. "
        "Contiguous groups of blocks that change hidden states little (arXiv 2403.17887) are tried too, and one is taken "
        "where it is clearly better. What is clearly worse after a few of at most 32 samples leaves. A model whose blocks "
        "read more than hidden states is in memory as a whole. `block_influence`: the blocks that change their input least "
        "(ShortGPT, arXiv 2403.03853), from one pass over the data.",
    )
    compensation: Literal["reconstruction", "least_squares", "none"] = Field(
        default_factory=EFFORTS.of("compensation"),
        description="How the kept weights compensate for removed units. `least_squares`: solve for the weights that read "
        "the kept units, towards the original outputs, and for the last matrix in front of removed blocks (ReplaceMe, arXiv "
        "2505.02819). `reconstruction`: do that, then train each block towards the "
        "original block's output (BRECQ, arXiv 2102.05426). Both read calibration data. `none`: leave them unchanged.",
    )
    reconstruction_epochs: int = Field(
        default_factory=EFFORTS.of("reconstruction_epochs"),
        ge=1,
        description="With `compensation: reconstruction`: epochs over the calibration data.",
    )
    reconstruction_target: Literal["outputs", "predictions"] = Field(
        default_factory=EFFORTS.of("reconstruction_target"),
        description="With `compensation: reconstruction`: what the last block is trained towards, the original block's "
        "`outputs` or the original's `predictions` of tokens. The other blocks are always trained towards outputs. "
        "`predictions` holds the head and the logits of a sample in memory. Without effect with `hidden`, and on models "
        "that do not predict the next token.",
    )
    reconstruction_lr: float = Field(
        default=0.04,
        gt=0,
        lt=1,
        description="Learning rate of block reconstruction, relative to the size of each tensor's values.",
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        amounts = [kind for kind in KINDS if getattr(self, kind) is not None]
        targets = [key for key in TARGETS if getattr(self, key) is not None]
        if amounts and targets:
            raise ValueError(f"give amounts or a target, not both `{amounts[0]}` and `{targets[0]}`")
        if not amounts and not targets:
            raise ValueError(f"give what to remove: {', '.join(f'`{key}`' for key in (*KINDS, *TARGETS))}")
        heads = [key for key in HEADS if getattr(self, key) is not None]
        if len(heads) > 1:
            raise ValueError(f"`{heads[0]}` and `{heads[1]}` both change heads: give one, or use two passes")
        if self.allocation == "kl" and self.mlp is None:
            raise ValueError("`allocation: kl` goes with `mlp`, the number of neurons to remove in total")
        if self.allocation == "kl" and self.importance not in ("obs", "activation"):
            raise ValueError("`allocation: kl` tries widths on calibration data: set `importance: obs` or `activation`")
        if targets and self.importance == "magnitude":
            raise ValueError(f"`{targets[0]}` tries shapes on calibration data: leave out `importance: magnitude`")
        return self

    @property
    def multiples(self) -> InputMultiple:
        """Multiples of kept neurons and channels."""
        return InputMultiple(self.multiple_of or 1, self.preferred_multiple or 1)

    @property
    def searched(self) -> bool:
        """Whether a target is given, for which the shape is searched."""
        return any(getattr(self, key) is not None for key in TARGETS)


HEADS = ("heads", "kv_heads", "keep_kv_heads")
KINDS = ("layers", "active_experts", "experts", "hidden", *HEADS, "mlp")
TARGETS = ("keep_parameters", "max_bytes", "max_latency_ratio")
