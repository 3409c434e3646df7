"""Shape of reports: a model for each part. The descriptions are the JSON schema."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, create_model

from compress.evaluation import metrics, positions
from compress.evaluation.metrics.base import Kind, Metric, MetricOfPasses
from compress.report.latency_schema import Emulated as Emulated
from compress.report.latency_schema import Latency as Latency
from compress.report.latency_schema import Memory as Memory
from compress.report.latency_schema import Timing as Timing
from compress.report.parts import Count, Number, Part
from compress.report.repetition_schema import Repetitions
from compress.report.throughput_schema import Throughput as Throughput


class CacheParts(Part):
    """A part of the cache of decoding: after n tokens it takes ``bytes_per_token`` times min(n, ``tokens``) bytes."""

    bytes_per_token: Count
    tokens: Count | None = Field(description="Most tokens that it keeps; null for all of them, and for patterns.")
    kept: list[list[Count]] | None = Field(
        default=None, description="Of a pattern: lengths of text, each with the tokens kept after it."
    )


class SizeRow(Part):
    """Size of a checkpoint."""

    bytes: Count = Field(description="Bytes of all weight files.")
    parameters: Count = Field(description="Float elements; shared ones once.")
    kept_parameters: Count = Field(description="Parameters that no keep-mask removes.")
    active_parameters: Count = Field(description="Used for one token.")
    bits_per_weight: Number = Field(description="Stored bits of data per parameter.")
    kv_bytes_per_token: Count | None = Field(
        description="Cached by decoding, per token, in the format that the config asks for."
    )
    cache: list[CacheParts] | None = Field(
        default=None, description="Parts of that cache by the tokens they keep; null where it is not known."
    )
    load_bytes: Count = Field(description="Memory of the weights after a stock load.")
    tensors: Count = Field(description="Logical tensors with bytes of their own.")


class _Measurement(Part):
    emulated: Emulated | None = Field(default=None, description="Rounded inputs and caches that the figures include.")


def _with_metrics(kind: Kind, listed: Sequence[Metric] | None = None) -> Callable[[type[Part]], Any]:
    """Class decorator that adds a field for each metric of a kind of evaluation, or for those ``listed``."""
    fields: dict[str, Any] = {
        metric.name: (
            Number | None if metric.nullable else Number,
            Field(
                default=None if isinstance(metric, MetricOfPasses) else ...,
                description=metric.evaluations[kind] or None,
            ),
        )
        for metric in (metrics.of_kind(kind) if listed is None else listed)
    }
    return lambda model: create_model(model.__name__, __base__=model, __doc__=model.__doc__, **fields)


class PositionSums(Part):
    """Sums over the scored tokens of a document or chunk, by bin of positions; bins as in `PositionRow`."""

    tokens: list[Count] = Field(description="Scored tokens.")
    bytes: list[Count] = Field(description="UTF-8 bytes of their text.")
    nll: list[Number] = Field(description="Negative log-likelihood, nats.")
    kl: list[Number] | None = Field(description="Divergence of the original from the model, nats.")
    agree: list[Count] | None = Field(description="Tokens at which both models' likeliest next token is the same.")


class DocumentScore(Part):
    """Sums over the scored tokens of a document or chunk."""

    id: str
    bytes: Count = Field(description="UTF-8 bytes of its text.")
    tokens: Count = Field(description="Scored tokens.")
    nll: Number = Field(description="Negative log-likelihood, nats.")
    kl: Number | None = Field(description="Divergence of the original from the model, nats.")
    agree: Count | None = Field(description="Tokens at which both models' likeliest next token is the same.")
    positions: PositionSums | None = Field(default=None, description="The same sums by position in the window.")


class _Positions(Part):
    """A bin of positions. A position is the index, in what the model reads, of the last token before the predicted one."""

    from_: Count = Field(alias="from", description="First position.")
    to: Count = Field(description="Last position.")
    tokens: Count = Field(description="Scored tokens.")


@_with_metrics("evaluation", positions.of_tokens())
class PositionRow(_Positions):
    """Scores of the tokens predicted at positions 0-15, 16-31, 32-63 and so on: each bin begins at a power of two."""

    bytes: Count = Field(description="UTF-8 bytes of their text.")
    nats_per_token: Number = Field(description="Mean negative log-likelihood.")


class PairedPosition(_Positions):
    """Loss at some positions, of the original and of the result."""

    bits_per_byte: list[Number] = Field(min_length=2, max_length=2, description="Before and after.")
    nats_per_token: list[Number] = Field(min_length=2, max_length=2, description="Before and after.")
    kl: Number | None = Field(description="Mean divergence of the original from the result per token, nats.")
    increase: Number = Field(description="Relative increase of bits per byte.")
    lower: Number = Field(description="Bound of the increase, one-sided at the recipe's confidence.")
    upper: Number = Field(description="Bound of the increase, one-sided at the recipe's confidence.")


class TokenPrediction(Part):
    """A model's prediction of one token."""

    text: str = Field(description="The likeliest token.")
    probability: Number = Field(description="Its probability.")
    of_true: Number = Field(description="Probability of the token that is there.")


class ChangedToken(Part):
    """A token at which the prediction differs much from the original's."""

    document: str = Field(description="Id of its document.")
    token: Count = Field(description="Its index there.")
    context: str = Field(description="Text before it.")
    text: str = Field(description="The token that is there.")
    kl: Number = Field(description="Divergence of the original from the model, nats.")
    before: TokenPrediction = Field(description="By the original.")
    after: TokenPrediction = Field(description="By the model.")


@_with_metrics("evaluation")
class Evaluation(_Measurement):
    """Scores on the evaluation text."""

    schema_: Literal["compress.evaluation/1"] = Field(alias="schema")
    unit: Literal["document", "chunk"] = Field(description="The unit that intervals resample.")
    window: int = Field(description="Tokens that the model reads at once.")
    stride: int = Field(description="Tokens between the starts of two windows.")
    streaming: bool = Field(default=False, description="Windows are segments, read through the cache.")
    positions: list[PositionRow] = Field(default=[], description="Scores by position in the window.")
    repetitions: Repetitions | None = Field(default=None, description="Where the metric `repetition` was measured.")
    changed: list[ChangedToken] = Field(
        default=[], description="The tokens with the largest divergence from the original; text of the evaluation data."
    )
    documents: list[DocumentScore] = Field(min_length=1)


class PredictionRow(Part):
    """Prediction for one labelled text or image."""

    id: str
    label: Count = Field(description="The true label.")
    prediction: Count = Field(description="The likeliest label.")
    nll: Number = Field(description="Negative log-likelihood of the true label, nats.")
    kl: Number | None = Field(description="Divergence of the original from the model over labels, nats.")
    agree: Count | None = Field(description="1 where both models' likeliest label is the same, else 0.")


@_with_metrics("classification")
class Classification(_Measurement):
    """Predictions of the labelled texts or images."""

    schema_: Literal["compress.classification/1"] = Field(alias="schema")
    unit: Literal["example"] = Field(description="The unit that intervals count or resample.")
    of: Literal["texts", "images"] = Field(default="texts", description="Kind of the examples.")
    labels: list[str] = Field(min_length=1, description="Names, by id.")
    cut: int = Field(description="Texts that are longer than the model reads.")
    cross_entropy: Number = Field(description="Mean negative log-likelihood, nats.")
    documents: list[PredictionRow] = Field(min_length=1)


class MaskedScore(Part):
    """Sums over the masked tokens of a document or window."""

    id: str
    tokens: Count = Field(description="Masked tokens.")
    nll: Number = Field(description="Negative log-likelihood, nats.")
    kl: Number | None = Field(description="Divergence of the original from the model, nats.")
    agree: Count | None = Field(description="Tokens at which both models' likeliest token is the same.")


@_with_metrics("masked")
class Masked(_Measurement):
    """Scores of a masked language model at the tokens that were masked."""

    schema_: Literal["compress.masked/1"] = Field(alias="schema")
    unit: Literal["document", "chunk"] = Field(description="The unit that intervals resample.")
    window: int = Field(description="Tokens that the model reads at once.")
    share: Number = Field(description="Fraction of tokens masked at random.")
    documents: list[MaskedScore] = Field(min_length=1)


class EmbeddedRow(Part):
    """The embedding of one text, or of both texts of a pair."""

    id: str
    similarity: Number | None = Field(description="Cosine to the original's; for a pair the mean of both.")
    cosine: Number | None = Field(description="Cosine of the two texts of a pair.")
    score: Number | None = Field(description="Label of the pair.")


@_with_metrics("embeddings")
class Embeddings(_Measurement):
    """Sentence embeddings of a base model."""

    schema_: Literal["compress.embeddings/1"] = Field(alias="schema")
    unit: Literal["example"] = Field(description="The unit that intervals resample.")
    pooling: list[str] = Field(description="Poolings of token vectors; the results of several are concatenated.")
    cut: int = Field(description="Texts that are longer than the model reads.")
    documents: list[EmbeddedRow] = Field(min_length=1)


#: An evaluation, by the model's task.
if TYPE_CHECKING:
    Measured: TypeAlias = Part
else:
    Measured = Annotated[Evaluation | Classification | Masked | Embeddings, Field(discriminator="schema_")]


class TaskRow(Part):
    """A task of lm-eval."""

    version: str = Field(description="Of the task.")
    shots: int | None = Field(description="Examples before each document.")
    metrics: dict[str, Number]
    higher: dict[str, bool] = Field(description="Whether more is better, by metric.")
    rows: list[dict[str, Any]] = Field(description="By document: id, hash, and the value of each metric.")


class Tasks(Part):
    """Tasks of lm-eval."""

    version: str = Field(description="Of lm-eval.")
    tasks: dict[str, TaskRow]


class PassRow(Part):
    """One pass of a stage."""

    name: str
    settings: dict[str, Any]
    planned: SizeRow = Field(description="Size that the plan computed from headers.")
    actual: SizeRow
    exact: bool = Field(description="Whether planned and actual must be equal.")
    details: dict[str, Any] = Field(description="What the pass says of its work.")


class Seconds(Part):
    """Wall time of a stage, when it was computed."""

    apply_and_write: Number
    verify: Number
    evaluate: Number


class Stage(Part):
    """Passes that ran in one read and one write."""

    index: int
    fingerprint: str
    content: str = Field(description="SHA-256 over all decoded tensors.")
    passes: list[PassRow]
    size: SizeRow
    seconds: Seconds
    predicted_seconds: Number | None = Field(
        default=None, description="Of applying and writing, predicted before the stage; null where it was not known."
    )
    peak_memory: int = Field(description="Resident bytes.")
    reused: bool
    folder: str
    evaluation: Measured | None
    latency: Latency | None
    throughput: Throughput | None = None
    lm_eval: Tasks | None = None


class Original(Part):
    """The checkpoint that the run began with."""

    checkpoint: str
    size: SizeRow
    evaluation: Measured | None
    latency: Latency | None
    throughput: Throughput | None = None
    lm_eval: Tasks | None = None


class Result(Part):
    """The last stage."""

    size: SizeRow
    evaluation: Measured | None
    latency: Latency | None
    throughput: Throughput | None = None
    lm_eval: Tasks | None = None
    positions: list[PairedPosition] | None = Field(
        default=None, description="Loss by position in the window, beside the original's; of causal language models."
    )


class GateRow(Part):
    """One judged bound."""

    gate: str
    verdict: Literal["pass", "fail", "inconclusive"]
    value: Number | None
    bound: Number
    lower: Number | None
    upper: Number | None
    unit: str
    documents_needed: int | None
    text: str


class RecipeRow(Part):
    """The recipe that ran."""

    path: str | None
    fingerprint: str
    resolved: dict[str, Any] = Field(description="With every default.")


class EvaluationData(Part):
    """The evaluation data."""

    files: list[str]
    sha256: str = Field(description="Of the files' contents and the settings that pick text from them.")
    documents: int = Field(description="Documents, chunks or labelled texts that were scored.")
    unit: Literal["document", "chunk", "example"] = Field(description="The unit that intervals resample.")


class CalibrationData(Part):
    """The calibration samples; null if no pass of the recipe reads any."""

    files: list[str]
    sha256: str = Field(description="Of the files' contents and the settings that pick samples from them.")
    mode: Literal["packed", "padded", "ids"] = Field(
        description="Windows of packed text, documents padded and masked, or token ids as they were given."
    )
    seed: int
    samples: int | None
    length: int | None = Field(description="Tokens of a sample.")
    ids_sha256: str | None = Field(
        description="Of the ids as little-endian int64, sample by sample, then of the mask's bytes where there is one."
    )
    chosen: list[str] | None = Field(
        description="Origin of each sample: `file#document+token` (where a window begins), `file#document` or `file#row`."
    )


class DataUsed(Part):
    """The data of a run; null if it used none."""

    evaluation: EvaluationData | None
    calibration: CalibrationData | None


class ExportedFile(Part):
    """A file or folder of another runtime."""

    target: str
    path: str
    bytes: Count


class Report(Part):
    """A run: its recipe, stages, measurements and gates."""

    schema_: Literal["compress.report/1"] = Field(alias="schema")
    versions: dict[str, str]
    machine: dict[str, Any]
    recipe: RecipeRow
    started: str = Field(description="ISO 8601, UTC.")
    seconds: Number
    status: Literal["passed", "failed", "inconclusive", "no gates"]
    exit_status: int
    output: str
    published: bool
    run_folder: str
    data: DataUsed
    original: Original
    stages: list[Stage] = Field(min_length=1)
    result: Result
    gates: list[GateRow]
    exports: list[ExportedFile] = Field(default=[], description="Files of other runtimes beside the output.")
    notes: list[str]
