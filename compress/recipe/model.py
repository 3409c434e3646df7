"""The recipe as a typed model. The descriptions here are the help, the documentation and the JSON schema."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr, ValidationInfo, WithJsonSchema, model_validator

from compress import passes
from compress.checkpoint.sidecars import with_links
from compress.evaluation.tasks import Task
from compress.passes.base import InputMultiple
from compress.recipe.data import Data, Text
from compress.recipe.entries import PassEntry, RecipeEntry
from compress.recipe.export_entries import RecipeExports
from compress.recipe.fit import Bound
from compress.recipe.gates import METRICS, Gates, metric_of
from compress.recipe.log import Log
from compress.recipe.metric_entries import SETTINGS, RecipeMetrics, parse_metric
from compress.recipe.sweep import Sweep, metric_of_goal
from compress.settings import ByteSize, Settings, expected

if TYPE_CHECKING:
    from compress.recipe.problems import Source

_DEVICE = r"auto|cpu|cuda(:[0-9]+)?"


def _device(value: str) -> str:
    if re.fullmatch(_DEVICE, value) is None:
        raise expected("auto, cpu, cuda or cuda:N", value)
    return value


Device = Annotated[str, AfterValidator(_device), WithJsonSchema({"type": "string", "pattern": f"^({_DEVICE})$"})]


def _completed(entries: tuple[PassEntry, ...], info: ValidationInfo) -> tuple[PassEntry, ...]:
    """The passes with the defaults filled in that depend on data sets and store of the recipe and on later passes."""
    data = info.data.get("data")
    given = [] if data is None else [name for name in Data.model_fields if getattr(data, name) is not None]
    later, result = InputMultiple(), []
    for entry in reversed(entries):
        instance = passes.get(entry.name)
        settings = instance.followed_by(
            instance.completed(entry.settings, given, info.data.get("store", "stock")), later
        )
        result.append(PassEntry(entry.name, settings))
        later = later.joined(instance.input_multiple(settings))
    return tuple(reversed(result))


class Recipe(Settings):
    """A checkpoint, the passes that make it smaller, and the gates that the result must pass.

    Made by `load_recipe` and `recipe_from_mapping`, which also check what concerns several keys (data, order, files).
    """

    model: Text = Field(description="The checkpoint: a folder, or a hub id, optionally with @revision.")
    output: Text = Field(description="Folder to write. The run keeps its stages beside it, in `<output>.run`.")
    store: Literal["stock", "compact"] = Field(
        default="stock",
        description="`stock`: every loader reads it. `compact`: smaller where possible; the checkpoint brings its own "
        "modelling file.",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of every random choice.")
    device: Device = Field(default="auto", description="Device to compute on: auto, cpu, cuda or cuda:N.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Number format of computation."
    )
    max_ram: ByteSize | None = Field(
        default=None, description="Most memory that the run may use, such as 8GiB. No limit by default."
    )
    max_vram: ByteSize | None = Field(
        default=None,
        description="Most memory of a GPU that the hidden states of calibration may fill, with the work on a block, such as "
        "20GB; the rest of them waits in files. By default nine tenths of what is free.",
    )
    threads: int | None = Field(default=None, ge=1, description="Threads of computation. By default torch decides.")
    evaluate_at: Literal["stage", "end"] = Field(
        default="stage", description="Evaluate after every stage, or only at the end."
    )
    document_separator: Text | None = Field(
        default=None, description="Line that separates documents in text files. Without it a file is one document."
    )
    max_shard_size: ByteSize = Field(default=5 * 10**9, description="Most bytes per weight file, such as 5GB.")
    trust_remote_code: bool = Field(
        default=False, description="Allow the code that a checkpoint brings (its `auto_map`)."
    )
    ignore_auto_map: bool = Field(
        default=False,
        description="Ignore the code that a checkpoint brings (its `auto_map`) and use transformers' own class of the model "
        "type. The output does not name the code either.",
    )
    allow_links: bool = Field(
        default=False,
        description="Follow symbolic links that lead out of the model's folder, if it is local. Their targets are copied into "
        "the output, so set it only for links that you made.",
    )
    offline: bool = Field(default=False, description="Use no network. Hub ids come from the cache.")
    data: Data = Field(default=Data(), description="Text to train on, to calibrate with, and to evaluate on.")
    passes: Annotated[tuple[RecipeEntry, ...], AfterValidator(_completed)] = Field(
        min_length=1, description="The passes, in order, each as `name: {settings}`."
    )
    evaluate: RecipeMetrics | None = Field(
        default=None,
        description="Metrics to measure besides those that gates need, each as a name or as `name: {settings}`. By default "
        "they depend on the model: bits_per_byte and kl for causal language models, perplexity and kl for masked ones, "
        "accuracy and agreement for classifiers, similarity for base models (and spearman where `data.evaluation` has scored "
        "pairs). None without `data.evaluation`.",
    )
    gates: Gates = Field(default=Gates(), description="Bounds that the result must keep to be published.")
    log: Log = Field(default=Log(), description="Trackers that get the figures of the finished run.")
    export: RecipeExports = Field(
        default=(),
        description="Files of other runtimes to write once the output is published, beside it: `gguf` writes `<output>.gguf`. "
        "Each as a name or as `name: {settings}`.",
    )
    fit: Bound | None = Field(
        default=None,
        description="A bound on the bytes of the result, in place of `passes`; `compress fit` finds these.",
    )
    sweep: Sweep | None = Field(
        default=None,
        description="Goals of a search over the values given as `{search: …}`; `compress sweep` runs it.",
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="Confidence of gates on metrics of text.")
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
    def reference(self) -> str | Path:
        """The model's folder or hub id, as `open_checkpoint` takes it, with links out of the folder allowed or not."""
        return with_links(self.model, self.allow_links)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics to measure: ``evaluate``, what gates read and the goals of a sweep, in the order of `METRICS`."""
        wanted = {*(entry.name for entry in self.evaluate or ()), *(metric_of(gate) for gate in self.gates.given())}
        wanted |= {metric_of_goal(goal) for goal in (() if self.sweep is None else self.sweep.goals)}
        return tuple(metric for metric in METRICS if metric in wanted)

    def settings_of(self, metric: str) -> Settings | None:
        """The settings of a metric: those of its entry in ``evaluate``, else its defaults; None for one without settings."""
        given = next((entry.settings for entry in self.evaluate or () if entry.name == metric), None)
        return given if given is not None or metric not in SETTINGS else SETTINGS[metric]()

    def fitted(self, task: Task) -> Self:
        """The recipe with ``evaluate`` filled in for a model of that task."""
        if self.evaluate is not None:
            return self
        evaluation = self.data.evaluation
        possible = () if evaluation is None else task.measurable(evaluation.given) or task.default
        return self.model_copy(update={"evaluate": tuple(parse_metric(m) for m in task.default if m in possible)})
