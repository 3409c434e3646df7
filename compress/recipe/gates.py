"""Gates of a recipe: bounds on measured values. `compress.gates` judges them, `compress.evaluation.metrics` defines most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, create_model, model_validator
from pydantic_core import core_schema

from compress.evaluation import metrics
from compress.evaluation.positions import is_edge
from compress.gates import PLACES
from compress.settings import AllowedIncrease, ByteSize, Level, Ratio, Settings, SizeRatio

METRICS: tuple[str, ...] = (*metrics.table(), "latency", "memory", "throughput", "lm_eval")
#: Gates whose metric has another name, and gates that need no metric.
_METRIC_OF_GATE = {"size": None, "parameters": None, "cache": None, "prefill": "latency", "decode": "latency"}


def metric_of(gate: str) -> str | None:
    """The metric that a gate reads; None where the files are enough."""
    return _METRIC_OF_GATE.get(gate, gate)


def lengths_of(gates: Mapping[str, Any]) -> list[int]:
    """Lengths at which gates need a measurement, ascending; ``gates`` in the plain form of `compress.gates.judge`."""
    listed = [each for name, gate in gates.items() if metric_of(name) in ("latency", "memory") for each in bounds(gate)]
    return sorted({each["at"] for each in listed if each.get("at") is not None})


def distances_of(gates: Mapping[str, Any]) -> list[int]:
    """Distances at which gates need the loss on repetitions, ascending; ``gates`` as in `lengths_of`."""
    return sorted({each["at"] for each in bounds(gates.get("repetition", ())) if each.get("at") is not None})


def bounds(gate: Any) -> list[Any]:
    """The gates of one name, of which there may be several."""
    return list(gate) if isinstance(gate, (list, tuple)) else [gate]


def _edge(position: int) -> int:
    if not is_edge(position):
        raise ValueError(f"losses are summed from powers of two on, 16 the smallest, and {position} is none")
    return position


Length = Annotated[int, Field(ge=1, le=2**31)]
Position = Annotated[int, Field(ge=1, le=2**31), AfterValidator(_edge)]


class Gate(Settings):
    """Bounds on one measured value; at least one is given."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        names = [name for name in type(self).model_fields if name not in PLACES]
        if all(getattr(self, name) is None for name in names):
            raise ValueError(f"a gate needs a bound: {' or '.join(f'`{name}`' for name in names)}")
        return self


class SizeGate(Gate):
    """Bounds on the bytes of all weight files."""

    max: ByteSize | None = Field(default=None, description="Largest number of bytes, such as 500MB.")
    max_ratio: SizeRatio | None = Field(default=None, description="Largest ratio to the original, such as 0.4 or 40%.")


class ParametersGate(Gate):
    """Bounds on the number of parameters."""

    max: int | None = Field(default=None, ge=1, description="Largest number of parameters.")
    max_ratio: SizeRatio | None = Field(default=None, description="Largest ratio to the original, such as 0.4 or 40%.")


class PositionGate(Gate):
    """Bounds on a metric that causal language models have at each position."""

    from_position: Position | None = Field(
        default=None,
        description="Count only tokens that are predicted at this position of the window or later, for causal language models: "
        "a power of two from 16 up. By default all.",
    )


class IncreaseGate(PositionGate):
    """Bounds on a metric for which lower is better."""

    max: float | None = Field(default=None, gt=0, description="Largest value.")
    max_increase: AllowedIncrease | None = Field(
        default=None, description="Largest increase over the original: 5% is relative, 0.02 is absolute."
    )


class DivergenceGate(PositionGate):
    """A bound on the divergence from the original."""

    max: float | None = Field(
        default=None, ge=0, description="Largest mean divergence in nats, per token or per labelled text."
    )


class AgreementGate(PositionGate):
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


class RepetitionGate(Gate):
    """Bounds on the loss on passages that come again."""

    at: Length | None = Field(
        default=None,
        description="Distance in tokens, one of those of `repetition`. By default the mean over all of them.",
    )
    max: float | None = Field(default=None, gt=0, description="Largest loss, nats per token.")
    max_increase: AllowedIncrease | None = Field(
        default=None,
        description="Largest increase over the original: 0.1 is absolute, in nats per token; 5% is relative.",
    )


class RatioGate(Gate):
    """A bound on a cost, as a ratio to the original's cost on the same machine."""

    at: Length | None = Field(
        default=None, description="Tokens of the prompt, one of the `lengths` of latency. By default its short prompt."
    )
    max_ratio: Ratio | None = Field(default=None, description="Largest ratio to the original, such as 0.9 or 90%.")


class RateGate(Gate):
    """A bound on a rate, as a ratio to the original's in the same runtime on the same machine."""

    min_ratio: Ratio | None = Field(default=None, description="Smallest ratio to the original, such as 1.5.")


class ThroughputGate(Settings):
    """Bounds on tokens per second in the runtime that `throughput` names."""

    prefill: RateGate | None = Field(default=None, description="Tokens of a prompt per second.")
    decode: RateGate | None = Field(default=None, description="Generated tokens per second.")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.prefill is None and self.decode is None:
            raise ValueError("a gate needs a bound: `prefill` or `decode`, such as `decode: {min_ratio: 1.5}`")
        return self


class CacheGate(Gate):
    """Bounds on the bytes of the cache after a text of so many tokens, counted by the headers of both models."""

    at: Length = Field(description="Tokens of the text.")
    max: ByteSize | None = Field(default=None, description="Largest number of bytes, such as 50MB.")
    max_ratio: Ratio | None = Field(default=None, description="Largest ratio to the original, such as 0.4 or 40%.")


class TaskGate(Gate):
    """Bounds on a task of lm-eval, paired with the original document by document."""

    task: str = Field(min_length=1, description="Name of the task.")
    metric: str | None = Field(default=None, description="Metric of the task, such as acc_norm. By default its first.")
    min: Level | None = Field(default=None, description="Smallest value, such as 0.6 or 60%, where more is better.")
    max_drop: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Largest drop below the original's value in points, where more is better.",
    )
    max: float | None = Field(default=None, gt=0, description="Largest value, where less is better.")
    max_increase: AllowedIncrease | None = Field(
        default=None,
        description="Largest increase over the original, where less is better: 5% is relative, 0.02 absolute.",
    )


class _OneOrSeveral:
    """Lets a gate be given once, or as a list of gates of that kind."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def several(value: Any) -> Any:
            if value == []:
                raise ValueError("expected a gate or a list of gates, got an empty list")
            return tuple(bounds(value))  # a tuple, as the whole is validated strictly

        return core_schema.no_info_before_validator_function(several, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        several = handler(schema)
        return {"anyOf": [several["items"], {**several, "minItems": 1}]}


RatioGates = Annotated[tuple[RatioGate, ...], _OneOrSeveral()]
CacheGates = Annotated[tuple[CacheGate, ...], _OneOrSeveral()]
TaskGates = Annotated[tuple[TaskGate, ...], _OneOrSeveral()]


#: Class of a metric's gate, by `Metric.gate`; several of a kind where they can be at different places.
_BOUNDS: dict[str, Any] = {
    "increase": Annotated[tuple[IncreaseGate, ...], _OneOrSeveral()],
    "divergence": Annotated[tuple[DivergenceGate, ...], _OneOrSeveral()],
    "agreement": Annotated[tuple[AgreementGate, ...], _OneOrSeveral()],
    "score": ScoreGate,
    "repetition": Annotated[tuple[RepetitionGate, ...], _OneOrSeveral()],
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

    prefill: RatioGates | None = Field(default=None, description="Time to read a prompt; several lengths as a list.")
    decode: RatioGates | None = Field(default=None, description="Time per generated token; several lengths as a list.")
    memory: RatioGates | None = Field(
        default=None, description="Peak memory of inference; with `at`, beyond the loaded weights."
    )
    throughput: ThroughputGate | None = Field(
        default=None, description="Tokens per second in the runtime that serves the result."
    )
    cache: CacheGates | None = Field(
        default=None, description="Bytes of the cache at a length of text. It is exact, and needs no measurement."
    )
    lm_eval: TaskGates | None = Field(
        default=None, description="Tasks of lm-eval, paired with the original; several as a list."
    )


def positions_of(gates: Gates) -> dict[str, int]:
    """Gates that count tokens from a position on, each with the last such position."""
    asked = {
        name: [getattr(gate, "from_position", None) for gate in bounds(getattr(gates, name))] for name in gates.given()
    }
    return {
        name: max(given) for name, each in asked.items() if (given := [first for first in each if first is not None])
    }
