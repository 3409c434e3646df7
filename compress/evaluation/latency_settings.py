"""Settings of the metric `latency`. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from compress.settings import Settings

#: Tokens of the prompt and generated tokens, where no lengths are given.
PROMPT, GENERATED = 256, 32


def _ascending(lengths: tuple[int, ...]) -> tuple[int, ...]:
    if twice := [length for i, length in enumerate(lengths) if length in lengths[:i]]:
        raise ValueError(f"the length {twice[0]} is named twice")
    return tuple(sorted(lengths))


Tokens = Annotated[int, Field(ge=1, le=2**31)]


class LatencySettings(Settings):
    """Lengths of text at which time, memory and cache are measured."""

    lengths: Annotated[tuple[Tokens, ...], Field(min_length=1), AfterValidator(_ascending)] | None = Field(
        default=None,
        description="Lengths of prompts, in tokens: prefill, decode at that depth, memory and bytes of the cache are "
        f"measured at each. By default one prompt of {PROMPT} tokens, without bytes of the cache.",
    )
    rounds: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="Rounds at each length. By default as many as fit into 8 seconds, 10 at least; gates need 10.",
    )
    generated: int = Field(default=GENERATED, ge=1, le=2**20, description="Tokens generated after each prompt.")
