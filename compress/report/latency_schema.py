"""Shape of reports: time, memory and cache. The descriptions are the JSON schema."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.report.parts import Count, Number, Part


class Emulated(Part):
    """Activations and caches that are rounded in the measured model as runtimes round them."""

    activations: dict[str, int] = Field(description="Format of inputs ▶ number of linear layers that read them so.")
    kv_cache: str | None = Field(description="Format of keys and values.")


class Timing(Part):
    """Seconds, by round."""

    median: Number
    p90: Number
    samples: list[Number] = Field(min_length=1)
    ratio: Number | None = Field(default=None, description="Median over the original's median.")
    lower: Number | None = Field(default=None, description="Bound of the ratio, one-sided at 95 %.")
    upper: Number | None = Field(default=None, description="Bound of the ratio, one-sided at 95 %.")


class ClockedTiming(Timing):
    """Wall seconds, by round, and on a CPU the process's CPU seconds."""

    cpu: Timing | None = Field(
        default=None, description="CPU seconds of all threads; other processes change them little."
    )


class PromptMemory(Part):
    """Peak memory of a prompt and what is generated after it, beyond the loaded weights."""

    peak: Count = Field(description="Bytes.")


class CacheRow(Part):
    """Tensors of the cache after the prompt, counted."""

    values: Count = Field(description="Numbers.")
    bytes: Count = Field(description="Bytes, in the format of computation.")
    planned: Count | None = Field(default=None, description="Numbers by the headers; null where they do not tell.")


class PathRow(Part):
    """Another way to read the prompt."""

    path: str = Field(description="`compress_local` (attention of this package), or `chunks` (`prefill_chunk_size`).")
    prefill: ClockedTiming = Field(description="Seconds for the prompt; ratios are to the original's stock path.")


class CostRow(Part):
    """Cost at one length of the prompt, by stock transformers."""

    length: Count = Field(description="Tokens of the prompt.")
    generated: Count = Field(description="Tokens generated after it.")
    depth: int = Field(description="Tokens before the generated ones; fewer than the prompt's where positions end.")
    rounds: Count
    prefill: ClockedTiming = Field(description="Seconds for the prompt.")
    decode: ClockedTiming | None = Field(description="Seconds per generated token at that depth.")
    memory: PromptMemory
    cache: CacheRow | None
    paths: list[PathRow] = Field(default_factory=list)


class Fit(Part):
    """Prefill seconds as a + b·n + c·n² of n tokens, fitted to the medians with relative weights and no negative term."""

    clock: Literal["cpu", "wall"] = Field(description="The seconds that were fitted.")
    a: Number | None
    b: Number | None
    c: Number | None
    c_lower: Number | None = Field(description="Bound of c over resampled rounds, one-sided at 95 %.")
    c_upper: Number | None = Field(description="Bound of c over resampled rounds, one-sided at 95 %.")
    half: Number | None = Field(description="Length where c·n² is half of the seconds; null where c is 0.")
    doubt: str | None = Field(description="Why c is not to be relied on; null for a sound fit.")


class PathFit(Part):
    """The fit of another way to read prompts."""

    path: str
    fit: Fit


class NotTried(Part):
    """A length that was asked for and not measured."""

    length: Count
    reason: str


class Memory(Part):
    """Peak memory of loading and inference, beyond what the process held before."""

    peak: Count = Field(description="Bytes.")
    ratio: Number | None = None


class Latency(Part):
    """Measured beside the original, interleaved."""

    rounds: int
    prompt: int = Field(description="Tokens.")
    generated: int = Field(description="Tokens.")
    prefill: Timing | None = Field(description="Seconds for the prompt.")
    decode: Timing | None = Field(description="Seconds per generated token.")
    memory: Memory
    lengths: list[CostRow] | None = Field(default=None, description="Cost by length, where lengths were asked for.")
    fit: Fit | None = None
    path_fits: list[PathFit] | None = Field(default=None, description="The same for the other ways to read prompts.")
    not_tried: list[NotTried] | None = Field(default=None, description="Lengths for which memory is short.")
    left_out: Emulated | None = Field(
        default=None,
        description="Rounded inputs and caches that the checkpoint asks for and the timed model does without.",
    )
