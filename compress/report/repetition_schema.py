"""Shape of the metric `repetition` in reports."""

from __future__ import annotations

from pydantic import Field

from compress.report.parts import Count, Number, Part


class RepetitionSample(Part):
    """Sums over the repeated tokens of a passage but its first."""

    tokens: Count = Field(description="Scored tokens.")
    nll: Number = Field(description="Negative log-likelihood, nats.")
    kl: Number | None = Field(description="Divergence of the original from the model, nats.")
    agree: Count | None = Field(description="Tokens at which both models' likeliest next token is the same.")


class RepetitionRow(Part):
    """Passages that come again at a distance."""

    distance: Count = Field(description="Tokens from the beginning of a passage to that of its repetition.")
    nats_per_token: Number = Field(description="Mean loss on the repetition.")
    kl: Number | None = Field(description="Mean divergence of the original from the model per token, nats.")
    agreement: Number | None = Field(
        description="Share of tokens at which both models' likeliest next token is the same."
    )
    samples: list[RepetitionSample] = Field(min_length=1)


class Repetitions(Part):
    """Loss on passages of the evaluation text that come again."""

    passage: Count = Field(description="Tokens of a passage.")
    seen_once: Number = Field(description="Mean loss on the same tokens the first time, nats per token.")
    distances: list[RepetitionRow] = Field(min_length=1)
