"""The gates of a recipe: bounds on measured values. `compress.gates` judges them."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from compress.evaluation.tasks import TEXT_METRICS
from compress.settings import AllowedIncrease, ByteSize, Level, Ratio, Settings

Metric = Literal[
    "bits_per_byte", "perplexity", "accuracy", "f1", "similarity", "spearman", "kl", "agreement", "latency", "memory"
]
METRICS: tuple[str, ...] = get_args(Metric)
assert set(METRICS) >= TEXT_METRICS
#: Gates whose metric has another name, and gates that need no metric.
_METRIC_OF_GATE = {"size": None, "parameters": None, "prefill": "latency", "decode": "latency"}


def metric_of(gate: str) -> str | None:
    """The metric that a gate reads; None where the files are enough."""
    return _METRIC_OF_GATE.get(gate, gate)


class Gate(Settings):
    """Bounds on one measured value; at least one is given."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        names = list(type(self).model_fields)
        if all(getattr(self, name) is None for name in names):
            raise ValueError(f"a gate needs a bound: {' or '.join(f'`{name}`' for name in names)}")
        return self


class SizeGate(Gate):
    """Bounds on the bytes of all weight files."""

    max: ByteSize | None = Field(default=None, description="Largest number of bytes, such as 500MB.")
    max_ratio: Ratio | None = Field(default=None, description="Largest ratio to the original, such as 0.4 or 40%.")


class ParametersGate(Gate):
    """Bounds on the number of parameters."""

    max: int | None = Field(default=None, ge=1, description="Largest number of parameters.")
    max_ratio: Ratio | None = Field(default=None, description="Largest ratio to the original, such as 0.4 or 40%.")


class IncreaseGate(Gate):
    """Bounds on a metric for which lower is better."""

    max: float | None = Field(default=None, gt=0, description="Largest value.")
    max_increase: AllowedIncrease | None = Field(
        default=None, description="Largest increase over the original: 5% is relative, 0.02 is absolute."
    )


class DivergenceGate(Gate):
    """A bound on the divergence from the original."""

    max: float | None = Field(
        default=None, ge=0, description="Largest mean divergence in nats, per token or per labelled text."
    )


class AgreementGate(Gate):
    """Bounds on the share of tokens, or of labelled texts, with the same top prediction as the original."""

    min: Level | None = Field(default=None, description="Smallest share, such as 0.95 or 95%.")
    max_drop: float | None = Field(
        default=None, ge=0, le=100, description="Largest drop below the original's 100%, in points."
    )


class ScoreGate(Gate):
    """Bounds on a score for which higher is better."""

    min: Level | None = Field(default=None, description="Smallest score, such as 0.9 or 90%.")
    max_drop: float | None = Field(
        default=None, ge=0, le=100, description="Largest drop below the original's score, in points."
    )


class RatioGate(Gate):
    """A bound on a cost, as a ratio to the original's cost on the same machine."""

    max_ratio: Ratio | None = Field(default=None, description="Largest ratio to the original, such as 0.9 or 90%.")


class Gates(Settings):
    """Bounds on the measured values of the result. Every given gate must pass."""

    size: SizeGate | None = Field(default=None, description="Bytes of all weight files.")
    parameters: ParametersGate | None = Field(default=None, description="Number of parameters.")
    bits_per_byte: IncreaseGate | None = Field(default=None, description="Bits per byte of the evaluation text.")
    perplexity: IncreaseGate | None = Field(default=None, description="Perplexity per token of the evaluation text.")
    accuracy: ScoreGate | None = Field(
        default=None, description="Share of labelled texts or images that are classified correctly."
    )
    f1: ScoreGate | None = Field(
        default=None, description="Macro F1: the mean of the labels' F1, on labelled texts or images."
    )
    similarity: ScoreGate | None = Field(
        default=None,
        description="Mean cosine similarity of sentence embeddings to the original's. A drop is counted from 1.",
    )
    spearman: ScoreGate | None = Field(
        default=None,
        description="Spearman's rank correlation between the cosine similarities of sentence pairs and their scores.",
    )
    kl: DivergenceGate | None = Field(
        default=None, description="KL divergence of the original's predictions from the result's."
    )
    agreement: AgreementGate | None = Field(
        default=None, description="Share of tokens, or of texts, with the same top prediction as the original."
    )
    prefill: RatioGate | None = Field(default=None, description="Time to read a prompt.")
    decode: RatioGate | None = Field(default=None, description="Time per generated token.")
    memory: RatioGate | None = Field(default=None, description="Peak memory of inference.")

    def given(self) -> list[str]:
        """Names of the gates that have a bound, in order."""
        return [name for name in type(self).model_fields if getattr(self, name) is not None]
