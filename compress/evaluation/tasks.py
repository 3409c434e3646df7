"""Tasks and their metrics, by the name of the model's class. Imports neither torch nor numpy."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from compress import architectures
from compress.errors import CompressError, DataError
from compress.evaluation import metrics
from compress.evaluation.metrics.base import Kind, MetricOfPasses
from compress.spec.classes import (
    CAUSAL_LM,
    IMAGE_CLASSIFICATION,
    MASKED_LM,
    QUESTION_ANSWERING,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)
from compress.spec.spec import Structure

#: Kinds of evaluation data: documents, labelled rows, or a folder of images for each class.
Given: TypeAlias = Literal["text", "labelled", "images"]


@dataclass(frozen=True, slots=True)
class Task:
    """A task of models, such as causal language modelling.

    Attributes:
        name: the task in words.
        suffixes: suffixes of the class names.
        kind: kind of its evaluations, which determines its metrics.
        takes: kinds of evaluation data.
        labels: kind of the labels; empty without labels.
    """

    name: str
    suffixes: tuple[str, ...]
    kind: Kind
    takes: tuple[Given, ...] = ("text",)
    labels: Literal["", "classes", "scores"] = ""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Its metrics on data."""
        return tuple(metric.name for metric in metrics.of_kind(self.kind))

    @property
    def default(self) -> tuple[str, ...]:
        """The metrics that are measured by default."""
        return tuple(metric.name for metric in metrics.of_kind(self.kind) if self.kind in metric.default)

    def measurable(self, given: Given) -> tuple[str, ...]:
        """Its metrics on data of a kind; empty if it does not take such data."""
        if given not in self.takes:
            return ()
        return tuple(metric for metric in self.metrics if given != "text" or metric not in LABELLED)


#: Metrics that need labels, and metrics that compare with the original model.
LABELLED = frozenset(metric.name for metric in metrics.table().values() if metric.labelled)
PAIRED = frozenset(metric.name for metric in metrics.table().values() if metric.compares)
#: Metrics that make forward passes of their own, which are measured only where they are named.
OF_PASSES: Mapping[str, MetricOfPasses] = {
    name: metric for name, metric in metrics.table().items() if isinstance(metric, MetricOfPasses)
}

CLASSIFICATION = Task(
    "text classification",
    SEQUENCE_CLASSIFICATION.suffixes,
    "classification",
    takes=("labelled",),
    labels="classes",
)
IMAGES = Task(
    "image classification",
    IMAGE_CLASSIFICATION.suffixes,
    "classification",
    takes=("images",),
    labels="classes",
)
MASKED = Task("masked language modelling", MASKED_LM.suffixes, "masked")
LANGUAGE = Task(
    "causal language modelling",
    CAUSAL_LM.suffixes,
    "evaluation",
)
EMBEDDING = Task(
    "sentence embedding",
    ("Model",),  # a base model without a head
    "embeddings",
    takes=("text", "labelled"),
    labels="scores",
)
#: In order of precedence: the first task with a matching suffix is taken.
TASKS = (CLASSIFICATION, IMAGES, MASKED, LANGUAGE, EMBEDDING)
#: Arguments of models that read sound.
SOUNDS = ("input_features", "input_values")
#: Metrics on text or images, of any task.
TEXT_METRICS = frozenset(metrics.table())
#: Metrics that are measured in separate processes.
SPEED_METRICS = frozenset({"latency", "memory"})


def task_of(class_name: str | None) -> Task:
    """Task of a stock class; causal language modelling for an unknown suffix. Loading refuses other models later."""
    return next((task for task in TASKS if (class_name or "").endswith(task.suffixes)), LANGUAGE)


def is_seq2seq(structure: Structure) -> bool:
    """Whether a model reads a source and writes a target: an encoder-decoder, as its config says."""
    others = (*SEQUENCE_CLASSIFICATION.suffixes, *TOKEN_CLASSIFICATION.suffixes, *QUESTION_ANSWERING.suffixes)
    single = (structure.class_name or "").endswith((*others, *CAUSAL_LM.suffixes, "Encoder", "EncoderModel"))
    return bool(structure.config.get("is_encoder_decoder")) and not single


def measurable(given: Given) -> frozenset[str]:
    """Metrics that some task has on data of a kind."""
    return frozenset(metric for task in TASKS for metric in task.measurable(given))


def check_metrics(class_name: str | None, wanted: Collection[str], *, given: Given | None) -> Task:
    """Task of a class, after checking that it has all ``wanted`` metrics on such data.

    Args:
        given: kind of the evaluation data; None without any.

    Raises:
        CompressError: a metric or the data belong to another task.
    """
    task, model = task_of(class_name), class_name or "this model"
    if wrong := [metric for metric in wanted if metric in TEXT_METRICS - set(task.metrics)]:
        raise CompressError(
            f"`{wrong[0]}` does not measure {task.name}, which {model} is for",
            fix=f"its metrics are {', '.join(task.metrics)}",
        )
    if given is None or not set(wanted) & TEXT_METRICS:
        return task
    if given not in task.takes:
        if "images" in (given, *task.takes):
            raise _of_images(task, model)
        raise CompressError(
            f"{task.name}, which {model} is for, takes {'labelled files' if task.labels else 'text without labels'}",
            fix="name the columns of texts and labels: `text`, `label`" if task.labels else "leave out `label`",
        )
    if wrong := [metric for metric in wanted if metric in TEXT_METRICS.difference(task.measurable(given))]:
        raise CompressError(f"`{wrong[0]}` needs labelled pairs of texts", fix="name the columns: `text`, `label`")
    return task


def check_speed(class_name: str | None, config: Mapping[str, Any], wanted: Collection[str]) -> None:
    """Raise `CompressError` if latency or memory is asked of a model that does not read one text of token ids."""
    if not set(wanted) & SPEED_METRICS:
        return
    model, fix = class_name or "this model", "leave out `latency`, `memory` and the gates `prefill`, `decode`, `memory`"
    record = architectures.find(config)
    if record is not None and record.input != "input_ids":
        raise CompressError(f"latency is measured on token ids, and {model} reads `{record.input}`", fix=fix)
    if config.get("is_encoder_decoder"):
        raise CompressError(f"latency is measured on one text, and {model} reads two", fix=fix)


def check_predicts_text(class_name: str | None, wanted: Collection[str]) -> None:
    """Raise `CompressError` if tasks of lm-eval are asked of a model that does not predict text."""
    if "lm_eval" in wanted and (task := task_of(class_name)) is not LANGUAGE:
        raise CompressError(
            f"tasks of lm-eval are for models that predict text, and {class_name or 'this model'} is for {task.name}",
            fix="leave out `lm_eval`",
        )


def check_streaming(class_name: str | None, streaming: bool) -> None:
    """Raise `DataError` if text is to be streamed through a model that is not a causal language model."""
    if streaming and (task := task_of(class_name)) is not LANGUAGE:
        raise DataError(
            f"`streaming` reads text through a cache, and {class_name or 'this model'} is for {task.name}",
            fix="leave out `streaming`",
        )


def check_images(class_name: str | None, images: bool) -> None:
    """Raise `DataError` if passes get images for a text model, or text for an image model."""
    if images != ("images" in (task := task_of(class_name)).takes):
        raise _of_images(task, class_name or "this model")


def calibrated_by(reads: str, class_name: str | None) -> bool:
    """Whether calibration data make the argument that a model's forward reads: token ids, sounds, images of classifiers."""
    return reads in (*SOUNDS, "input_ids") or task_of(class_name) is IMAGES


def check_sounds(class_name: str | None, reads: str, sounds: bool) -> None:
    """Raise `DataError` if passes get text for a model that reads sound, sound for another one, or anything else to make.

    Args:
        reads: the argument of the model's forward that data fills.
    """
    model = class_name or "this model"
    if sounds and reads not in SOUNDS:
        raise DataError(f"{model} reads `{reads}`, not sound", fix="name `files`")
    if not sounds and reads in SOUNDS:
        raise DataError(f"{model} reads sound (`{reads}`)", fix="name a folder of .wav files: `speech`")
    if not calibrated_by(reads, class_name):
        raise DataError(
            f"{model} reads `{reads}`, which calibration does not make", fix="use a method that needs no calibration"
        )


def _of_images(task: Task, model: str) -> DataError:
    if "images" in task.takes:
        return DataError(
            f"{task.name}, which {model} is for, takes a folder of images for each class", fix="name it: `images`"
        )
    return DataError(f"{task.name}, which {model} is for, takes text, not images", fix="name `files`")


def label_ids(config: Mapping[str, Any]) -> tuple[list[str], dict[str, int]]:
    """Names of a classifier's labels by id, and a map from every name in ``id2label`` and ``label2id`` to its id.

    Without names in the config they are LABEL_0 and so on, two of them if it has no number either.

    Raises:
        CompressError: the model does not predict a distribution over labels, or the config's names disagree.
    """
    given = config.get("id2label") or {i: f"LABEL_{i}" for i in range(int(config.get("num_labels") or 2))}
    try:
        names = {int(index): str(name) for index, name in given.items()}
        ids = {str(name): int(index) for name, index in (config.get("label2id") or {}).items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise CompressError("`id2label` or `label2id` of config.json is not a mapping of labels") from None
    problem = config.get("problem_type")
    if problem not in (None, "single_label_classification") or len(names) < 2:
        raise CompressError(
            f"accuracy needs a model that gives each example one of several labels, this one does {problem or 'regression'}"
        )
    if sorted(names) != list(range(len(names))):
        raise CompressError("`id2label` of config.json does not count from 0")
    both = {name: index for name, index in ids.items() if index in names}
    both |= {name: index for index, name in names.items()}
    return [names[i] for i in range(len(names))], both


def label_id(value: Any, names: Mapping[str, int]) -> int | None:
    """Id of a label in a file: of one of the names, or the integer itself; None for anything else."""
    if isinstance(value, str) and value.strip() in names:
        return names[value.strip()]
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]+\s*", value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():  # parquet stores integers of a column with gaps as floats
        value = int(value)
    known = isinstance(value, int) and not isinstance(value, bool) and value in names.values()
    return int(value) if known else None


def score(value: Any) -> float | None:
    """Score in a file as a finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
