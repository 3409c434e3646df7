"""Settings of `local_attention`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, field_serializer, model_validator

from compress.passes.base import PassSettings
from compress.settings import Fraction, Level, expected, parse_share


def _windows(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values or not all(isinstance(w, int) and not isinstance(w, bool) and w >= 2 for w in values):
        raise expected("a number of tokens from 2 up, or a list of such numbers", value)
    if len(set(values)) != len(values):
        raise ValueError("a window is named twice")
    return tuple(sorted(values))


def _full(value: Any) -> tuple[int, ...] | float | int:
    if isinstance(value, (list, tuple)):
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
            raise expected("a list of numbers from 0 up", value)
        if len(set(value)) != len(value):
            raise ValueError("a block is named twice")
        return tuple(sorted(value))
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return parse_share(value)


def _sinks(value: Any) -> str | int:
    if value == "learned" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        result: str | int = value
        return result
    raise expected("`learned`, or a number of tokens from 0 up", value)


WindowSizes = Annotated[
    tuple[int, ...],
    BeforeValidator(_windows),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 2},
                {"type": "array", "items": {"type": "integer", "minimum": 2}, "minItems": 1},
            ],
            "examples": [1024, [256, 1024]],
        }
    ),
]
Full = Annotated[
    tuple[int, ...] | float | int,
    BeforeValidator(_full),
    WithJsonSchema(
        {
            "anyOf": [{"type": ["number", "string"]}, {"type": "array", "items": {"type": "integer", "minimum": 0}}],
            "examples": ["25%", 8, [0, 7, 15]],
        }
    ),
]
Sinks = Annotated[
    Literal["learned"] | int,
    BeforeValidator(_sinks),
    WithJsonSchema({"anyOf": [{"const": "learned"}, {"type": "integer", "minimum": 0}], "examples": ["learned", 0, 4]}),
]


class LocalAttentionSettings(PassSettings):
    """Settings of `local_attention`."""

    window: WindowSizes = Field(
        description="Tokens that a local block sees, the token itself among them. With a list, each block gets one of them; "
        "stock classes hold a single window, so more than one needs `store: compact`."
    )
    full: Full | None = Field(
        default=None,
        description="Blocks (with `by: heads`, KV heads) that go on seeing everything: a share, a count, or a list of block "
        "numbers from 0. 25% by default.",
    )
    max_cache: Fraction | None = Field(
        default=None,
        description="Instead of `full`: largest share of the original's cache at `at` tokens, such as 40%.",
    )
    at: int | None = Field(
        default=None,
        ge=2,
        description="Tokens at which the cache is counted. By default the number of positions that the model is trained for.",
    )
    by: Literal["layers", "heads"] = Field(
        default="layers",
        description="What has a window: whole blocks, which stock classes express, or single KV heads, which need "
        "`store: compact`.",
    )
    sinks: Sinks = Field(
        default="learned",
        description="What stands for the first tokens, once a window has dropped them (attention sinks, arXiv 2309.17453). "
        "`learned`: a logit per head in the denominator of the softmax, calibrated, and the first tokens' mean value, in "
        "biases; a Llama becomes a stock GraniteSWA. A number: that many first tokens stay visible, with `store: compact`. 0: "
        "nothing; stock in many families, and in need of repair. By default `learned`, or 4 where a stock class cannot express "
        "the windows.",
    )
    pattern: Literal["window", "strided", "fixed", "chunks"] = Field(
        default="window",
        description="What a local block sees. `window`: the tokens before it. `strided`: the tokens before it and every n-th "
        "token. `fixed`: its own stretch and the last tokens of every stretch before it (both arXiv 1904.10509). `chunks`: "
        "its own stretch. All but `window` need `store: compact`.",
    )
    stride: int | None = Field(
        default=None, ge=1, description="Of `strided`: every so many-th token stays visible. By default the window."
    )
    keep: int = Field(
        default=1, ge=1, description="Of `fixed`: so many last tokens of each earlier stretch stay visible."
    )
    positions: int | None = Field(
        default=None,
        ge=1,
        description="Length of text that the model is trained for. In longer texts first tokens that stay are met at the "
        "distance that they have there, so a model without full heads reads on without end. By default what the config says.",
    )
    choose: Literal["divergence", "every"] = Field(
        default="divergence",
        description="Which blocks or KV heads are full. `divergence`: those whose window would cost most, by gradients on "
        "calibration data. `every`: every n-th, from the first; KV heads are counted through all blocks.",
    )
    long_range: Level = Field(
        default=0.25,
        description="Share of the calibration samples in which a passage comes again at a distance. Without them the choice "
        "forgets how to copy.",
    )
    repeat_weight: float = Field(
        default=10,
        ge=1,
        le=1000,
        description="Weight of a token of such a passage in the choice, where it comes again; all others have 1. A larger one "
        "keeps the blocks that copy.",
    )
    sink_steps: int = Field(
        default=0,
        ge=0,
        description="Steps of gradient descent on the logits of sinks alone, towards the original's predictions; 32 are "
        "enough. Both models are then in memory, in float32.",
    )
    tune_epochs: int = Field(
        default=0,
        ge=0,
        description="Epochs of training on the calibration samples towards the original's predictions, after the windows are "
        "set. Some samples are held out, and the weights that are best on these stay. Both models are then in memory, the "
        "trained one in float32.",
    )
    target: str | None = Field(
        default=None,
        description="Model type of the result, such as ministral, smollm3, qwen2 or cwm. By default the first stock family "
        "that can express it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if isinstance(data, dict) and "sinks" not in data:
            many = isinstance(data.get("window"), (list, tuple)) and len(data["window"]) > 1
            if many or data.get("by") == "heads" or data.get("pattern", "window") != "window":
                return {**data, "sinks": 4}
        return data

    @field_serializer("window")
    def _as_given(self, window: tuple[int, ...]) -> int | list[int]:
        """A single window as a number."""
        return window[0] if len(window) == 1 else list(window)

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.edits and self.sinks == "learned":
            raise ValueError("logits of sinks are for windows that a stock class expresses: set `sinks: 4`, or 0")
        for key, pattern in (("stride", "strided"), ("keep", "fixed")):
            if key in self.model_fields_set and self.pattern != pattern:
                raise ValueError(f"`{key}` is for `pattern: {pattern}`")
        if self.positions is not None and not self.edits:
            raise ValueError("`positions` is for first tokens that stay: set `sinks` to a number of them")
        if len(self.window) > 1 and self.by == "heads":
            raise ValueError("KV heads of a block share one window: give one, or `by: layers`")
        if len(self.window) > 1 and (self.choose == "every" or isinstance(self.full, tuple)):
            raise ValueError("which block gets which window is chosen by divergence: give one window")
        if self.full is not None and self.max_cache is not None:
            raise ValueError("give `full` or `max_cache`, not both")
        if self.at is not None and self.at <= max(self.window):
            raise ValueError(f"`at` is no longer than the window of {max(self.window)}")
        if "repeat_weight" in self.model_fields_set and self.long_range == 0:
            raise ValueError("`repeat_weight` is for passages that come again: set `long_range` above 0")
        if self.sink_steps and self.sinks != "learned":
            raise ValueError("`sink_steps` trains logits: set `sinks: learned`")
        if isinstance(self.full, tuple) and self.by == "heads":
            raise ValueError("with `by: heads` give `full` as a share or a count")
        return self

    @property
    def edits(self) -> bool:
        """Whether the windows need edits of structure, since no stock class expresses them."""
        tokens = self.sinks != "learned" and self.sinks != 0
        return self.by == "heads" or tokens or self.pattern != "window" or len(self.window) > 1

    @property
    def measured(self) -> bool:
        """Whether losses of windows are measured, for the choice or for the logits of sinks."""
        choice = self.choose == "divergence" and not isinstance(self.full, tuple) and self.full != 0
        return choice or self.sinks == "learned"

    @property
    def calibrated(self) -> bool:
        """Whether calibration data decide anything."""
        return self.measured or self.tune_epochs > 0

    def full_count(self, units: int) -> int:
        """Number of units (blocks, or KV heads) that stay full by ``full``, out of so many."""
        full = 0.25 if self.full is None else self.full
        if isinstance(full, tuple):
            return len(full)
        return math.floor(full * units + 0.5) if isinstance(full, float) else full
