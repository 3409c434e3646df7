"""Gates of a recipe: bounds on measured values. `compress.gates` judges them, `compress.evaluation.metrics` defines most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, create_model, model_validator

from compress.evaluation import metrics
from compress.settings import AllowedIncrease, ByteSize, Level, Ratio, Settings

METRICS: tuple[str, ...] = (*metrics.table(), "latency", "memory")
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


#: Class of a metric's gate, by `Metric.gate`.
_BOUNDS: dict[str, type[Gate]] = {
    "increase": IncreaseGate,
    "divergence": DivergenceGate,
    "agreement": AgreementGate,
    "score": ScoreGate,
    "repetition": IncreaseGate,
}


class _GatesOfFiles(Settings):
    size: SizeGate | None = Field(default=None, description="Bytes of all weight files.")
    parameters: ParametersGate | None = Field(default=None, description="Number of parameters.")

    def given(self) -> list[str]:
        """Names of the gates that have a bound, in order."""
        return [name for name in type(self).model_fields if getattr(self, name) is not None]


if TYPE_CHECKING:
    _GatesOfMetrics = _GatesOfFiles
else:
    _GatesOfMetrics = create_model(
        "_GatesOfMetrics",
        __base__=_GatesOfFiles,
        **{
            metric.name: (_BOUNDS[metric.gate] | None, Field(default=None, description=metric.help))
            for metric in metrics.table().values()
        },
    )


class Gates(_GatesOfMetrics):
    """Bounds on the measured values of the result. Every given gate must pass."""

    prefill: RatioGate | None = Field(default=None, description="Time to read a prompt.")
    decode: RatioGate | None = Field(default=None, description="Time per generated token.")
    memory: RatioGate | None = Field(default=None, description="Peak memory of inference.")
