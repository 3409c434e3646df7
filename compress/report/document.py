"""The report as JSON: strict (no bare NaN), versioned, with a schema."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from compress.errors import ReportError, one_line
from compress.files import write_atomically

SCHEMA = "compress.report/1"
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _number(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


#: A JSON number; what is not finite is one of three words, as JSON has no number for it.
Number = Annotated[
    float,
    BeforeValidator(_number),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": sorted(_NOT_FINITE)}]}),
]


#: What can be counted; a hand-made report could say anything.
Count = Annotated[int, Field(ge=0, le=2**53)]


class Part(BaseModel):
    """A part of a document; what it does not know stays."""

    model_config = ConfigDict(extra="allow")


class SizeRow(Part):
    """What a checkpoint costs."""

    bytes: Count = Field(description="Of all weight files.")
    parameters: Count = Field(description="Float elements; shared ones once.")
    kept_parameters: Count = Field(description="Those that no keep-mask removes.")
    active_parameters: Count = Field(description="Used for one token.")
    bits_per_weight: Number = Field(description="Stored bits of data per parameter.")
    kv_bytes_per_token: Count | None = Field(
        description="Cached by decoding, per token, in the format that the config asks for."
    )
    load_bytes: Count = Field(description="Memory of the weights after a stock load.")
    tensors: Count = Field(description="Logical tensors with bytes of their own.")


class Emulated(Part):
    """What is rounded in the measured model as runtimes round it."""

    activations: dict[str, int] = Field(description="Format of inputs ▶ number of linear layers that read them so.")
    kv_cache: str | None = Field(description="Format of keys and values.")


class _Measurement(Part):
    emulated: Emulated | None = Field(default=None, description="Rounded inputs and caches that the figures include.")


class DocumentScore(Part):
    """Sums over the scored tokens of a document or chunk."""

    id: str
    bytes: Count = Field(description="UTF-8 bytes of its text.")
    tokens: Count = Field(description="Scored tokens.")
    nll: Number = Field(description="Negative log-likelihood, nats.")
    kl: Number | None = Field(description="Divergence of the original from the model, nats.")
    agree: Count | None = Field(description="Tokens at which both models' likeliest next token is the same.")


class Evaluation(_Measurement):
    """Scores on the evaluation text."""

    schema_: Literal["compress.evaluation/1"] = Field(alias="schema")
    unit: Literal["document", "chunk"] = Field(description="What comparisons resample.")
    window: int = Field(description="Tokens that the model reads at once.")
    stride: int = Field(description="Tokens between the starts of two windows.")
    bits_per_byte: Number
    perplexity: Number = Field(description="Per token.")
    kl: Number | None = Field(description="Mean per token, nats.")
    agreement: Number | None = Field(description="Share of tokens.")
    documents: list[DocumentScore] = Field(min_length=1)


class PredictionRow(Part):
    """What a classifier says of one labelled text or image."""

    id: str
    label: Count = Field(description="The true label.")
    prediction: Count = Field(description="The likeliest label.")
    nll: Number = Field(description="Negative log-likelihood of the true label, nats.")
    kl: Number | None = Field(description="Divergence of the original from the model over labels, nats.")
    agree: Count | None = Field(description="1 where both models' likeliest label is the same, else 0.")


class Classification(_Measurement):
    """Predictions of the labelled texts or images."""

    schema_: Literal["compress.classification/1"] = Field(alias="schema")
    unit: Literal["example"] = Field(description="What comparisons count or resample.")
    of: Literal["texts", "images"] = Field(default="texts", description="What was classified.")
    labels: list[str] = Field(min_length=1, description="Names, by id.")
    cut: int = Field(description="Texts that are longer than the model reads.")
    accuracy: Number
    f1: Number = Field(description="Mean of the labels' F1, of those that some example has or is given.")
    cross_entropy: Number = Field(description="Mean negative log-likelihood, nats.")
    kl: Number | None = Field(description="Mean per text or image, nats.")
    agreement: Number | None = Field(description="Share of texts or images.")
    documents: list[PredictionRow] = Field(min_length=1)


class MaskedScore(Part):
    """Sums over the masked tokens of a document or window."""

    id: str
    tokens: Count = Field(description="Masked tokens.")
    nll: Number = Field(description="Negative log-likelihood, nats.")
    kl: Number | None = Field(description="Divergence of the original from the model, nats.")
    agree: Count | None = Field(description="Tokens at which both models' likeliest token is the same.")


class Masked(_Measurement):
    """Scores of a masked language model at the tokens that were masked."""

    schema_: Literal["compress.masked/1"] = Field(alias="schema")
    unit: Literal["document", "chunk"] = Field(description="What comparisons resample.")
    window: int = Field(description="Tokens that the model reads at once.")
    share: Number = Field(description="Of the tokens, masked by lot.")
    perplexity: Number = Field(description="Per masked token.")
    kl: Number | None = Field(description="Mean per masked token, nats.")
    agreement: Number | None = Field(description="Share of masked tokens.")
    documents: list[MaskedScore] = Field(min_length=1)


class EmbeddedRow(Part):
    """The embedding of one text, or of both texts of a pair."""

    id: str
    similarity: Number | None = Field(description="Cosine to the original's; of a pair the mean of both.")
    cosine: Number | None = Field(description="Of the two texts of a pair.")
    score: Number | None = Field(description="What the pair's label says.")


class Embeddings(_Measurement):
    """Sentence embeddings of a base model."""

    schema_: Literal["compress.embeddings/1"] = Field(alias="schema")
    unit: Literal["example"] = Field(description="What comparisons resample.")
    pooling: list[str] = Field(description="How tokens' vectors become one; several stand side by side.")
    cut: int = Field(description="Texts that are longer than the model reads.")
    similarity: Number | None = Field(description="Mean cosine to the original's.")
    spearman: Number | None = Field(description="Rank correlation of cosines and scores.")
    documents: list[EmbeddedRow] = Field(min_length=1)


#: What evaluations give, by the model's task.
Measured = Annotated[Evaluation | Classification | Masked | Embeddings, Field(discriminator="schema_")]


class Timing(Part):
    """Seconds, by round."""

    median: Number
    p90: Number
    samples: list[Number] = Field(min_length=1)
    ratio: Number | None = Field(default=None, description="Median over the original's median.")
    lower: Number | None = Field(default=None, description="Of the ratio, one-sided at 95 %.")
    upper: Number | None = Field(default=None, description="Of the ratio, one-sided at 95 %.")


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
    left_out: Emulated | None = Field(
        default=None,
        description="Rounded inputs and caches that the checkpoint asks for and the timed model does without.",
    )


class PassRow(Part):
    """One pass of a stage."""

    name: str
    settings: dict[str, Any]
    planned: SizeRow = Field(description="What the plan said of the headers alone.")
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
    peak_memory: int = Field(description="Resident bytes.")
    reused: bool
    folder: str
    evaluation: Measured | None
    latency: Latency | None


class Original(Part):
    """The checkpoint that the run began with."""

    checkpoint: str
    size: SizeRow
    evaluation: Measured | None
    latency: Latency | None


class Result(Part):
    """The last stage."""

    size: SizeRow
    evaluation: Measured | None
    latency: Latency | None


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
    """The text that was measured on."""

    files: list[str]
    sha256: str = Field(description="Of the files' contents and the settings that pick text from them.")
    documents: int = Field(description="Documents, chunks or labelled texts that were scored.")
    unit: Literal["document", "chunk", "example"] = Field(description="What comparisons resample.")


class CalibrationData(Part):
    """The samples that passes looked at; null where no pass of the recipe looks at any."""

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
        description="What each sample is: `file#document+token` (where a window begins), `file#document` or `file#row`."
    )


class DataUsed(Part):
    """The text of a run; null where it used none."""

    evaluation: EvaluationData | None
    calibration: CalibrationData | None


class Report(Part):
    """What a run did, measured and decided."""

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
    notes: list[str]


def to_json(data: Mapping[str, Any]) -> str:
    """Strict JSON, indented; NaN and infinities become the words ``NaN``, ``Infinity``, ``-Infinity``."""
    return json.dumps(_strict(data), indent=1, allow_nan=False, ensure_ascii=False)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    return [_strict(v) for v in value] if isinstance(value, (list, tuple)) else value


def save(report: Mapping[str, Any], path: Path) -> None:
    """Write a report in one step."""
    write_atomically(path, (to_json(report) + "\n").encode())


def load(path: Path) -> dict[str, Any]:
    """Read a report; words for NaN and infinities are numbers again. Raises `ReportError` for anything else."""
    return read(path, "report", validate)


def read(path: Path, what: str, validate: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The JSON document in a file, validated; ``what`` it is to be. Raises `ReportError` that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"is no {what}: {one_line(error)}"
        raise ReportError(reason, where=str(path)) from None
    try:
        return validate(data)
    except ReportError as error:
        error.where = f"{path}: {error.where}" if error.where else str(path)
        raise


def validate(data: Any) -> dict[str, Any]:
    """The report as plain values. Raises `ReportError` that names the first key at fault."""
    if not isinstance(data, dict) or not str(data.get("schema", "")).startswith("compress.report/"):
        raise ReportError("is no report of this tool", fix="a run writes report.json into its run folder")
    if data["schema"] != SCHEMA:
        raise ReportError(f"is of the schema {data['schema']}, this version reads {SCHEMA}")
    return checked(Report, data)


def checked(model: type[Part], data: Any) -> dict[str, Any]:
    """JSON values of a model's shape, as plain values. Raises `ReportError` that names the first key at fault."""
    try:
        return model.model_validate(data).model_dump(by_alias=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ReportError(f"is damaged: {first['msg']}", where=".".join(str(p) for p in first["loc"])) from None
    except RecursionError:
        raise ReportError("is damaged: it is nested too deep") from None


@contextlib.contextmanager
def judged(path: str | Path) -> Iterator[None]:
    """What cannot be computed of values that stand in a file is that file's fault. Raises `ReportError`."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ReportError(f"its values do not fit together ({reason})", where=str(path)) from error


class _Statistics(Part):
    """How intervals are made; the resamples are bounded by what takes minutes."""

    confidence: float = Field(ge=0.5, lt=1)
    bootstrap: int = Field(ge=100, le=10**9)
    seed: int = Field(ge=0, lt=2**64)


def check_statistics(path: str | Path, settings: Mapping[str, Any]) -> None:
    """The settings of intervals that a report's recipe names can be used. Raises `ReportError`."""
    try:
        checked(_Statistics, dict(settings))
    except ReportError as error:
        error.where = f"{path}: recipe.resolved.{error.where}"
        raise


def report_schema() -> dict[str, Any]:
    """JSON schema of reports (draft 2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA,
        **Report.model_json_schema(by_alias=True),
    }
