"""What a recipe may hold. The descriptions here are the help, the documentation and the JSON schema."""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from compress import passes
from compress.data.text import FIELD, FIELD_KINDS, holds_ids, kind, template_columns
from compress.errors import CompressError
from compress.evaluation.tasks import TEXT_METRICS, Given, Task
from compress.passes.base import PassSettings
from compress.settings import AllowedIncrease, ByteSize, Settings

if TYPE_CHECKING:
    from compress.recipe.problems import Source

Metric = Literal[
    "bits_per_byte", "perplexity", "accuracy", "f1", "similarity", "spearman", "kl", "agreement", "latency", "memory"
]
METRICS: tuple[str, ...] = get_args(Metric)
assert set(METRICS) >= TEXT_METRICS
#: Gates whose metric has another name, or that need none.
_METRIC_OF_GATE = {"size": None, "parameters": None, "prefill": "latency", "decode": "latency"}

_DEVICE = r"auto|cpu|cuda(:[0-9]+)?"
_PERCENT = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*$")


def _fail(expected: str, value: Any) -> PydanticCustomError:
    return PydanticCustomError(
        "amount", "expected {expected}, got {value}", {"expected": expected, "value": repr(value)}
    )


def _number(value: Any) -> float | None:
    if isinstance(value, str) and (match := _PERCENT.match(value)):
        return float(match[1]) / 100 if math.isfinite(float(match[1])) else None
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 10**308
    return float(value) if known else None  # of larger integers there is no float


def _device(value: str) -> str:
    if re.fullmatch(_DEVICE, value) is None:
        raise _fail("auto, cpu, cuda or cuda:N", value)
    return value


def _ratio(value: Any) -> float:
    number = _number(value)
    if number is None or number <= 0:
        raise _fail("a ratio above 0, such as 0.4 or 40%", value)
    return number


def _level(value: Any) -> float:
    number = _number(value)
    if number is None or not 0 <= number <= 1:
        raise _fail("a share from 0 to 1, such as 0.95 or 95%", value)
    return number


def _distinct(value: tuple[str, ...]) -> tuple[str, ...]:
    if twice := [name for i, name in enumerate(value) if name in value[:i]]:
        raise ValueError(f"`{twice[0]}` is named twice")
    return value


Device = Annotated[str, AfterValidator(_device), WithJsonSchema({"type": "string", "pattern": f"^({_DEVICE})$"})]
Ratio = Annotated[
    float, BeforeValidator(_ratio), WithJsonSchema({"type": ["number", "string"], "examples": [0.4, "40%"]})
]
Level = Annotated[
    float, BeforeValidator(_level), WithJsonSchema({"type": ["number", "string"], "examples": [0.95, "95%"]})
]
Text = Annotated[str, Field(min_length=1)]
Files = Annotated[tuple[Text, ...], Field(min_length=1)]


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


#: One name, or a list of two.
ColumnSettings = Annotated[
    tuple[Text, ...],
    Field(min_length=1, max_length=2),
    BeforeValidator(_listed),
    AfterValidator(_distinct),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


_KINDS = "Text files: .txt, .jsonl, .json, .csv, .tsv or .parquet, each also packed (.gz, .zst)"


_IMAGES = (
    "In place of `files`, for image classifiers: a folder that holds a folder of images (.png, .jpg, .jpeg, .bmp, .webp) "
    "for each class, called as in the config's id2label or label2id, or by its number. {others}."
)
#: Settings that say how text is read, and what each is where it says nothing.
_OF_TEXT = {
    "field": FIELD,
    "template": None,
    "text": None,
    "label": None,
    "mode": "packed",
    "length": None,
    "window": 256,
    "stride": None,
}
_FILES_OR_IMAGES: Any = {"oneOf": [{"required": ["files"]}, {"required": ["images"]}]}


class TextFiles(Settings):
    """Files of text, and the field to read of those that have fields."""

    files: Files = Field(description=f"{_KINDS}.")
    field: Text = Field(
        default=FIELD,
        description="Field to read of .jsonl, .json, .csv, .tsv and .parquet files: text, or chats as lists of "
        "{role, content} or {from, value}, which get the tokenizer's chat template.",
    )
    template: Text | None = Field(
        default=None,
        description="In place of `field`, the text of a row from several columns, each named in braces: "
        '"{instruction}\\n{input}\\n{output}". Empty values leave nothing.',
    )

    @property
    def folder(self) -> str | None:
        """The folder of images in place of files."""
        images: str | None = getattr(self, "images", None)
        return images

    @model_validator(mode="after")
    def _files_or_images(self) -> Self:
        if bool(self.files) == (self.folder is not None):
            raise ValueError("give either `files` or `images`" + (", not both" if self.files else ""))
        said = [name for name, nothing in _OF_TEXT.items() if getattr(self, name, nothing) != nothing]
        if self.folder is not None and said:
            raise ValueError(f"`{said[0]}` says how text is read: it does not go with `images`")
        return self

    @model_validator(mode="after")
    def _has_fields(self) -> Self:
        text = getattr(self, "text", None)
        if self.template is not None:
            template_columns(self.template)  # raises what is wrong with it
            if named := next((n for n in ("text", "label") if getattr(self, n, None) is not None), None):
                raise ValueError(f"`template` makes one plain text of a row: it does not go with `{named}`")
            if self.field != FIELD:
                raise ValueError("`template` names the columns, so leave out `field`")
            if wrong := next((file for file in self.files if kind(file) not in FIELD_KINDS), None):
                raise ValueError(f"`template` names columns, and {wrong} has none")
        if text is not None and self.field != FIELD:
            raise ValueError("`text` names the column, so leave out `field`")
        if text is not None and (wrong := next((file for file in self.files if kind(file) not in FIELD_KINDS), None)):
            raise ValueError(f"`text` names a column, and {wrong} has none")
        if self.field != FIELD and not any(kind(f) in (*FIELD_KINDS, ".safetensors") for f in self.files):
            raise ValueError(f"`field` names one of several, and {self.files[0]} has none")
        return self


class Sampled(TextFiles):
    """Files of which models are shown samples of so many tokens."""

    files: Files = Field(
        description=f"{_KINDS}; or one .npy or .safetensors file of token ids, integers [samples, length], used as they "
        "are (`field` names the tensor where a file has several)."
    )
    text: ColumnSettings | None = Field(
        default=None,
        description="Of .jsonl, .json, .csv, .tsv and .parquet files the column of the text, or two columns of texts that the "
        "model reads together, [sentence1, sentence2], where each row is shown to the model by itself, as encoders read it; "
        "in place of `field`.",
    )
    mode: Literal["packed", "padded"] = Field(
        default_factory=lambda fields: "packed" if fields["text"] is None else "padded",
        description="`packed`: documents in one stream, cut into windows. `padded`: each document by itself, with the "
        "tokenizer's special tokens, cut to `length` or padded on the right and masked. The default is `packed`, and "
        "`padded` with `text`.",
    )
    length: int | None = Field(
        default_factory=lambda fields: None if not fields["files"] or holds_ids(fields["files"][0]) else 256,
        ge=1,
        description="Tokens of each, 256 by default; of token ids the first so many, all by default.",
    )

    @model_validator(mode="after")
    def _text_or_ids(self) -> Self:
        if self.folder is not None:
            return self
        if not any(holds_ids(f) for f in self.files):
            for name in ("samples", "length"):
                if getattr(self, name, 1) is None:
                    raise ValueError(f"`{name}` is a number where the data is text")
        elif len(self.files) > 1:
            raise ValueError("token ids come from one file, with no other beside it")
        elif self.mode != "packed":
            raise ValueError("token ids are used as they are: leave out `mode`")
        if self.text is not None and self.mode == "packed":
            raise ValueError("`text` names texts that are read one by one: leave out `mode: packed`, or use `field`")
        return self


class TrainingData(Sampled):
    """Text or images that passes train on: all of them, in samples."""

    model_config = ConfigDict(json_schema_extra=_FILES_OR_IMAGES)

    files: Files = Field(default=(), description=Sampled.model_fields["files"].description)
    images: Text | None = Field(default=None, description=_IMAGES.format(others="No other key goes with it"))
    label: Text | None = Field(
        default=None,
        description="With `text`, the column of the label, as in `data.evaluation`: what the loss `labels` of text "
        "classifiers reads.",
    )

    @model_validator(mode="after")
    def _label_of_text(self) -> Self:
        if self.label is not None and self.text is None:
            raise ValueError("`label` goes with `text`, the column that it is of")
        if self.text is not None and self.label in self.text:
            raise ValueError(f"`text` and `label` both name the column `{self.label}`")
        return self


class CalibrationSection(Sampled):
    """Text whose activations passes look at."""

    samples: int | None = Field(
        default_factory=lambda fields: None if holds_ids(fields["files"][0]) else 128,
        ge=1,
        description="Windows or documents drawn from the text, 128 by default; of token ids the first so many, all by "
        "default.",
    )


class EvaluationSection(TextFiles):
    """Text or images that the original and every stage are measured on."""

    model_config = ConfigDict(json_schema_extra=_FILES_OR_IMAGES)

    files: Files = Field(default=(), description=f"{_KINDS}; they may share no text with training or calibration.")
    images: Text | None = Field(
        default=None,
        description=f"{_IMAGES.format(others='Of the other keys `max_documents` alone goes with it')} They may share no file "
        "with training.",
    )
    window: int = Field(default=256, ge=2, description="Tokens that the model sees at once.")
    stride: int | None = Field(
        default=None,
        ge=1,
        description="Tokens between the starts of two windows; the window by default, so none overlap.",
    )
    max_documents: int | None = Field(
        default=None,
        ge=1,
        description="Measure on the first so many documents only; of images, of all classes by turns.",
    )
    text: ColumnSettings | None = Field(
        default=None,
        description="Of labelled .jsonl, .json, .csv, .tsv and .parquet files the column of the text, or two columns of texts "
        "that the model reads together: [sentence1, sentence2]. `text` by default where `label` is given.",
    )
    label: Text | None = Field(
        default=None,
        description="The column of the label. For text classifiers: an integer, or a name in the config's id2label or "
        "label2id. For sentence embeddings of base models: the score of the pair of texts that `text` names. Each row is read "
        "whole: `field`, `window` and `stride` have no meaning then.",
    )
    quantized_kv_cache: bool = Field(
        default=True,
        description="Measure with keys and values rounded where the checkpoint's config says so (`cast: {kv_cache: fp8}`), as "
        "vLLM and SGLang serve it. `false`: without, as stock transformers computes. Inputs of linear layers are rounded where "
        "the config says so in either case.",
    )

    @model_validator(mode="after")
    def _labelled(self) -> Self:
        if self.label is None:
            if self.text is not None:
                raise ValueError("`text` goes with `label`; the column of plain text is `field`")
            return self
        if self.label in self.columns:
            raise ValueError(f"`text` and `label` both name the column `{self.label}`")
        fields = type(self).model_fields
        if odd := next((n for n in ("field", "window", "stride") if getattr(self, n) != fields[n].default), None):
            hint = "name the column with `text`" if odd == "field" else "each text is read whole"
            raise ValueError(f"`{odd}` is not for labelled texts: {hint}")
        if wrong := next((file for file in self.files if kind(file) not in FIELD_KINDS), None):
            raise ValueError(f"`label` names a column, and {wrong} has none")
        return self

    @property
    def given(self) -> Given:
        """What the data are."""
        return "images" if self.images is not None else "text" if self.label is None else "labelled"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of labelled texts."""
        return self.text or (FIELD,)

    @model_validator(mode="after")
    def _no_gaps(self) -> Self:
        if self.stride is not None and self.stride > self.window:
            raise ValueError(f"a stride of {self.stride} would skip text, as the window is {self.window} tokens")
        return self


class Data(Settings):
    """The text or images of a run."""

    training: TrainingData | None = Field(default=None, description="Text or images that passes train on.")
    calibration: CalibrationSection | None = Field(default=None, description="Text whose activations passes look at.")
    evaluation: EvaluationSection | None = Field(
        default=None, description="Text or images that models are measured on."
    )

    @property
    def needs_model(self) -> bool:
        """Whether the model says how data are read: labels, and classes of images."""
        sets = [section for section in (self.training, self.evaluation) if section is not None]
        return any(section.images is not None or section.label is not None for section in sets)


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

    max: ByteSize | None = Field(default=None, description="Most bytes, such as 500MB.")
    max_ratio: Ratio | None = Field(default=None, description="Largest ratio to the original, such as 0.4 or 40%.")


class ParametersGate(Gate):
    """Bounds on the number of parameters."""

    max: int | None = Field(default=None, ge=1, description="Most parameters.")
    max_ratio: Ratio | None = Field(default=None, description="Largest ratio to the original, such as 0.4 or 40%.")


class IncreaseGate(Gate):
    """Bounds on a metric that is better when lower."""

    max: float | None = Field(default=None, gt=0, description="Largest value.")
    max_increase: AllowedIncrease | None = Field(
        default=None, description="Largest increase over the original: 5% is relative, 0.02 absolute."
    )


class DivergenceGate(Gate):
    """A bound on the divergence from the original."""

    max: float | None = Field(
        default=None, ge=0, description="Largest mean divergence per token, or per labelled text, in nats."
    )


class AgreementGate(Gate):
    """Bounds on the share of tokens, or of labelled texts, where the likeliest prediction is the original's."""

    min: Level | None = Field(default=None, description="Smallest share, such as 0.95 or 95%.")
    max_drop: float | None = Field(
        default=None, ge=0, le=100, description="Largest drop from the original's 100%, in points."
    )


class ScoreGate(Gate):
    """Bounds on a score that is better when higher."""

    min: Level | None = Field(default=None, description="Smallest score, such as 0.9 or 90%.")
    max_drop: float | None = Field(
        default=None, ge=0, le=100, description="Largest drop from the original's score, in points."
    )


class RatioGate(Gate):
    """A bound on a cost, as a ratio to the original's on the same machine."""

    max_ratio: Ratio | None = Field(default=None, description="Largest ratio to the original, such as 0.9 or 90%.")


class Gates(Settings):
    """Bounds on what was measured of the result; each gate that is given must hold."""

    size: SizeGate | None = Field(default=None, description="Bytes of all weight files.")
    parameters: ParametersGate | None = Field(default=None, description="Number of parameters.")
    bits_per_byte: IncreaseGate | None = Field(default=None, description="Bits per byte of the evaluation text.")
    perplexity: IncreaseGate | None = Field(default=None, description="Perplexity per token of the evaluation text.")
    accuracy: ScoreGate | None = Field(
        default=None, description="Share of labelled texts or images that are classified rightly."
    )
    f1: ScoreGate | None = Field(
        default=None, description="Mean of the labels' F1 (macro), on labelled texts or images."
    )
    similarity: ScoreGate | None = Field(
        default=None, description="Mean cosine of sentence embeddings to the original's; a drop is one from 1."
    )
    spearman: ScoreGate | None = Field(
        default=None, description="Rank correlation of the cosines of pairs of sentences with their scores."
    )
    kl: DivergenceGate | None = Field(default=None, description="Divergence from the original's predictions.")
    agreement: AgreementGate | None = Field(
        default=None, description="How often the likeliest token, or label, is the original's."
    )
    prefill: RatioGate | None = Field(default=None, description="Time to read a prompt.")
    decode: RatioGate | None = Field(default=None, description="Time per generated token.")
    memory: RatioGate | None = Field(default=None, description="Peak memory of inference.")

    def given(self) -> list[str]:
        """Names of the gates that have a bound, in order."""
        return [name for name in type(self).model_fields if getattr(self, name) is not None]


def metric_of(gate: str) -> str | None:
    """The metric a gate judges by; None where the files alone tell."""
    return _METRIC_OF_GATE.get(gate, gate)


@dataclass(frozen=True)
class PassEntry:
    """One pass of a recipe; ``settings`` is an instance of the pass's own settings model."""

    name: str
    settings: PassSettings


def parse_pass(value: Any) -> PassEntry:
    """``{name: settings}``, or a bare name where every setting has a default.

    Raises `ValidationError` or `PydanticCustomError`; inside pydantic these get the path of the entry.
    """
    if isinstance(value, PassEntry):
        return value
    if isinstance(value, str):
        value = {value: None}
    if not isinstance(value, dict):
        raise PydanticCustomError("pass_entry", "expected a pass, as `name: {settings}`")
    if len(value) != 1:
        given = ", ".join(f"`{key}`" for key in value) or "none"
        raise PydanticCustomError(
            "pass_entry",
            "expected one pass, got {given}",
            {
                "given": given,
                "hint": "an entry is `- name: {settings}`; settings stand below the name, indented further than it",
            },
        )
    name, settings = next(iter(value.items()))
    known = passes.names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"expected one of: {', '.join(known)}" + (f"; did you mean `{close[0]}`?" if close else "")
        raise PydanticCustomError("pass_entry", "unknown pass `{name}`", {"name": name, "hint": hint})
    try:
        model = passes.get(name).settings
    except (CompressError, ImportError, AttributeError) as error:  # a plug-in that does not import
        raise PydanticCustomError(
            "pass_entry", "the pass `{name}` cannot be loaded: {error}", {"name": name, "error": str(error)}
        ) from None
    if isinstance(settings, model):
        return PassEntry(name, settings)
    if settings is not None and not isinstance(settings, dict):
        raise PydanticCustomError(
            "pass_entry",
            "{name}: expected a mapping of settings, got {value}",
            {"name": name, "value": repr(settings), "hint": f"as `{name}: {{setting: value}}`"},
        )
    # by way of JSON: strict about types, yet a list serves for a tuple
    text = json.dumps({} if settings is None else settings)
    return PassEntry(name, model.model_validate_json(text, strict=True))


RecipeEntry = Annotated[PassEntry, PlainValidator(parse_pass), WithJsonSchema({"type": ["object", "string"]})]


def _completed(entries: tuple[PassEntry, ...], info: ValidationInfo) -> tuple[PassEntry, ...]:
    """The passes with those settings said whose defaults depend on the data of the recipe."""
    data = info.data.get("data")
    given = [] if data is None else [name for name in Data.model_fields if getattr(data, name) is not None]
    return tuple(PassEntry(e.name, passes.get(e.name).completed(e.settings, given)) for e in entries)


class Recipe(Settings):
    """A checkpoint, the passes that make it smaller, and the gates that the result must pass.

    Made by `load_recipe` and `recipe_from_mapping`, which also check what concerns several keys (data, order, files).
    """

    model: Text = Field(description="The checkpoint: a folder, or a hub id, with @revision or not.")
    output: Text = Field(description="Folder to write; the run keeps its stages beside it, in `<output>.run`.")
    store: Literal["stock", "compact"] = Field(
        default="stock",
        description="`stock`: what any loader reads. `compact`: smaller where it can be, and brings its modelling file.",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seeds every choice.")
    device: Device = Field(default="auto", description="Where to compute: auto, cpu, cuda or cuda:N.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Number format of computation."
    )
    max_ram: ByteSize | None = Field(
        default=None, description="Most memory the run may use, such as 8GiB; no limit by default."
    )
    threads: int | None = Field(
        default=None, ge=1, description="Threads of computation; as many as torch takes by default."
    )
    evaluate_at: Literal["stage", "end"] = Field(
        default="stage", description="Measure after every stage, or at the end only."
    )
    document_separator: Text | None = Field(
        default=None, description="Line that separates documents in text files; without it a file is one document."
    )
    max_shard_size: ByteSize = Field(default=5 * 10**9, description="Most bytes per weight file, such as 5GB.")
    trust_remote_code: bool = Field(
        default=False, description="Allow code that a foreign checkpoint brings (its `auto_map`)."
    )
    ignore_auto_map: bool = Field(
        default=False,
        description="Leave out of account that a checkpoint brings code (its `auto_map`): take transformers' own class of the "
        "model type. What is written does not name the code either.",
    )
    offline: bool = Field(default=False, description="Use no network; hub ids come from the cache.")
    data: Data = Field(default=Data(), description="Text to train on, to calibrate with, and to measure on.")
    passes: Annotated[tuple[RecipeEntry, ...], AfterValidator(_completed)] = Field(
        min_length=1, description="The passes, in order, each as `name: {settings}`."
    )
    evaluate: Annotated[tuple[Metric, ...], AfterValidator(_distinct)] | None = Field(
        default=None,
        description="What to measure besides what gates need. By default what fits the model: bits_per_byte and kl of causal "
        "language models, perplexity and kl of masked ones, accuracy and agreement of classifiers, similarity (and "
        "spearman where `data.evaluation` has labelled pairs) of base models; nothing without `data.evaluation`.",
    )
    gates: Gates = Field(default=Gates(), description="What must hold of the result, or it is not published.")
    confidence: float = Field(
        default=0.95, gt=0.5, lt=1, description="Confidence with which a gate on measured text is judged."
    )
    bootstrap: int = Field(default=10_000, ge=100, description="Resamples for confidence intervals.")

    _source: Source | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _code_or_not(self) -> Self:
        if self.trust_remote_code and self.ignore_auto_map:
            raise ValueError(
                "`trust_remote_code` uses a checkpoint's code and `ignore_auto_map` leaves it out: set one"
            )
        return self

    @property
    def source(self) -> Source | None:
        """Where each part is written; None for a recipe that Python built directly."""
        return self._source

    @property
    def metrics(self) -> tuple[str, ...]:
        """What to measure: ``evaluate`` and what the gates judge by, in the order of `METRICS`."""
        wanted = {*(self.evaluate or ()), *(metric_of(gate) for gate in self.gates.given())}
        return tuple(metric for metric in METRICS if metric in wanted)

    def fitted(self, task: Task) -> Self:
        """The recipe with ``evaluate`` said, for a model of that task."""
        if self.evaluate is not None:
            return self
        evaluation = self.data.evaluation
        possible = () if evaluation is None else task.measurable(evaluation.given) or task.default
        return self.model_copy(update={"evaluate": tuple(m for m in task.default if m in possible)})
