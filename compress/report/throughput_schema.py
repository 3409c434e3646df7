"""Shape of reports: tokens per second in a runtime. The descriptions are the JSON schema."""

from __future__ import annotations

from pydantic import Field

from compress.report.parts import Count, Number, Part


class Rate(Part):
    """Tokens per second, by round."""

    median: Number
    samples: list[Number] = Field(min_length=1)
    ratio: Number | None = Field(default=None, description="Median over the original's median.")
    lower: Number | None = Field(default=None, description="Bound of the ratio, one-sided at 95 %.")
    upper: Number | None = Field(default=None, description="Bound of the ratio, one-sided at 95 %.")


class Throughput(Part):
    """Measured beside the original, in turns, in the runtime that serves the result."""

    runtime: str
    version: str
    bytes: Count = Field(description="Of what the runtime opens.")
    prompt: Count = Field(description="Tokens.")
    generated: Count = Field(description="Tokens.")
    threads: Count
    variables: dict[str, str] = Field(
        default_factory=dict, description="Of the runtime's environment, which bear on its speed."
    )
    rounds: Count
    prefill: Rate = Field(description="Tokens of the prompt per second.")
    decode: Rate = Field(description="Generated tokens per second.")
