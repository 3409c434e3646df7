"""The ``fit`` section of a recipe: a bound on bytes in place of passes."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from compress.settings import AllowedIncrease, ByteSize, Settings, SizeRatio

#: Families that can give up bytes, in the order of their passes, and trellis codes. Bits per weight always can.
FamilyName = Literal["depth", "width", "kv_heads", "sharing", "sparsity", "embeddings", "trellis"]
FAMILIES: tuple[FamilyName, ...] = get_args(FamilyName)


class Bound(Settings):
    """A bound on the bytes of the result; which passes keep it is found by measuring. `compress fit` runs it."""

    max_bytes: ByteSize | None = Field(
        default=None, description="Most bytes of the result's weight files, such as 200MB."
    )
    max_ratio: SizeRatio | None = Field(default=None, description="The same as a ratio to the original's, such as 20%.")
    max_increase: AllowedIncrease | None = Field(
        default=None,
        description="Largest increase of the metric of the model's task, such as 1%: a gate on the result. It needs "
        "`data.evaluation`.",
    )
    families: tuple[FamilyName, ...] = Field(
        default=FAMILIES,
        description="What may be given up besides bits per weight. `depth`: blocks. `width`: neurons of MLPs. `kv_heads`: KV "
        "heads, with the query heads that read them. `sharing`: blocks store their weights together. `sparsity`: single "
        "weights, with `store: compact`. `embeddings`: bits of the tables of tokens and of the head. `trellis`: trellis codes "
        "in place of integers of 2 to 4 bits, with `store: compact`; they cost time, not accuracy.",
    )
    tokens: int = Field(
        default=0,
        ge=0,
        description="Tokens of distillation from the original after blocks, neurons or heads were removed or shared. It needs "
        "`data.training`. 0 for none.",
    )
    finalists: int = Field(
        default=3, ge=1, le=16, description="Combinations that are tried whole before the best of them is made."
    )
    effort: Literal["fast", "balanced", "best"] = Field(
        default="balanced", description="Effort of the passes that make the result; trials are `fast`."
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.max_bytes is None) == (self.max_ratio is None):
            raise ValueError("give one of `max_bytes` and `max_ratio`")
        return self

    def most(self, original: int) -> int:
        """The bound in bytes, for an original of so many."""
        if self.max_bytes is not None:
            return self.max_bytes
        assert self.max_ratio is not None
        return int(self.max_ratio * original)
