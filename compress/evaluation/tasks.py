"""What a model can be measured by, from the name of its class. Needs neither torch nor numpy."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from compress import architectures
from compress.errors import CompressError, DataError
from compress.spec.classes import CAUSAL_LM, IMAGE_CLASSIFICATION, MASKED_LM, SEQUENCE_CLASSIFICATION

#: What evaluation data are: documents, rows with labels, or a folder of images for each class.
Given: TypeAlias = Literal["text", "labelled", "images"]


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of model.

    Attributes:
        name: in words. suffixes: how names of its classes end. metrics: read off data; ``default`` where none is named.
        takes: evaluation data of these kinds. labels: what their labels are, empty where they have none.
    """

    name: str
    suffixes: tuple[str, ...]
    metrics: tuple[str, ...]
    default: tuple[str, ...]
    takes: tuple[Given, ...] = ("text",)
    labels: Literal["", "classes", "scores"] = ""

    def measurable(self, given: Given) -> tuple[str, ...]:
        """Its metrics on data of a kind; none where it takes no such data."""
        if given not in self.takes:
            return ()
        return tuple(metric for metric in self.metrics if given != "text" or metric not in LABELLED)


#: Metrics that need labels, and those that need the original beside the model.
LABELLED = frozenset({"accuracy", "f1", "spearman"})
PAIRED = frozenset({"kl", "agreement", "similarity"})

CLASSIFICATION = Task(
    "text classification",
    SEQUENCE_CLASSIFICATION.suffixes,
    ("accuracy", "f1", "agreement", "kl"),
    ("accuracy", "agreement"),
    takes=("labelled",),
    labels="classes",
)
IMAGES = Task(
    "image classification",
    IMAGE_CLASSIFICATION.suffixes,
    CLASSIFICATION.metrics,
    CLASSIFICATION.default,
    takes=("images",),
    labels="classes",
)
MASKED = Task("masked language modelling", MASKED_LM.suffixes, ("perplexity", "kl", "agreement"), ("perplexity", "kl"))
LANGUAGE = Task(
    "causal language modelling",
    CAUSAL_LM.suffixes,
    ("bits_per_byte", "perplexity", "kl", "agreement"),
    ("bits_per_byte", "kl"),
)
EMBEDDING = Task(
    "sentence embedding",
    ("Model",),  # a base model, without a head
    ("similarity", "spearman"),
    ("similarity", "spearman"),
    takes=("text", "labelled"),
    labels="scores",
)
#: The first one whose suffix fits counts.
TASKS = (CLASSIFICATION, IMAGES, MASKED, LANGUAGE, EMBEDDING)
#: Metrics read off text or images, of any task.
TEXT_METRICS = frozenset(metric for task in TASKS for metric in task.metrics)
#: Metrics measured in processes of their own.
SPEED_METRICS = frozenset({"latency", "memory"})


def task_of(class_name: str | None) -> Task:
    """The task of a stock class, by its name; what is no language model after all is refused when it is loaded."""
    return next((task for task in TASKS if (class_name or "").endswith(task.suffixes)), LANGUAGE)


def measurable(given: Given) -> frozenset[str]:
    """Metrics that some task reads off data of a kind."""
    return frozenset(metric for task in TASKS for metric in task.measurable(given))


def check_metrics(class_name: str | None, metrics: Collection[str], *, given: Given | None) -> Task:
    """The task of a class, of which all ``metrics`` that are read off data must be.

    Args:
        given: what the evaluation data are; None where there are none.

    Raises:
        CompressError: a metric is of another task, or the data are.
    """
    task, model = task_of(class_name), class_name or "this model"
    if wrong := [metric for metric in metrics if metric in TEXT_METRICS - set(task.metrics)]:
        raise CompressError(
            f"`{wrong[0]}` does not measure {task.name}, which {model} is for",
            fix=f"its metrics are {', '.join(task.metrics)}",
        )
    if given is None or not set(metrics) & TEXT_METRICS:
        return task
    if given not in task.takes:
        if "images" in (given, *task.takes):
            raise _of_images(task, model)
        raise CompressError(
            f"{task.name}, which {model} is for, takes {'labelled files' if task.labels else 'text without labels'}",
            fix="name the columns of texts and labels: `text`, `label`" if task.labels else "leave out `label`",
        )
    if wrong := [metric for metric in metrics if metric in TEXT_METRICS.difference(task.measurable(given))]:
        raise CompressError(f"`{wrong[0]}` needs labelled pairs of texts", fix="name the columns: `text`, `label`")
    return task


def check_speed(class_name: str | None, config: Mapping[str, Any], metrics: Collection[str]) -> None:
    """Latency and memory are measured on one text of token ids. Raises `CompressError` for models that read something else."""
    if not set(metrics) & SPEED_METRICS:
        return
    model, fix = class_name or "this model", "leave out `latency`, `memory` and the gates `prefill`, `decode`, `memory`"
    record = architectures.find(config)
    if record is not None and record.input != "input_ids":
        raise CompressError(f"latency is measured on token ids, and {model} reads `{record.input}`", fix=fix)
    if config.get("is_encoder_decoder"):
        raise CompressError(f"latency is measured on one text, and {model} reads two", fix=fix)


def check_images(class_name: str | None, images: bool) -> None:
    """Data that passes read are images where the model reads images, and text where it reads text. Raises `DataError`."""
    if images != ("images" in (task := task_of(class_name)).takes):
        raise _of_images(task, class_name or "this model")


def _of_images(task: Task, model: str) -> DataError:
    if "images" in task.takes:
        return DataError(
            f"{task.name}, which {model} is for, takes a folder of images for each class", fix="name it: `images`"
        )
    return DataError(f"{task.name}, which {model} is for, takes text, not images", fix="name `files`")


def label_ids(config: Mapping[str, Any]) -> tuple[list[str], dict[str, int]]:
    """Names of a classifier's labels in order, and every name that stands for one (``id2label`` and ``label2id``).

    A config without names has the stock ones, LABEL_0 and so on; two where it has no number either.

    Raises:
        CompressError: the model gives no distribution over labels, or the config's names do not fit together.
    """
    given = config.get("id2label") or {i: f"LABEL_{i}" for i in range(int(config.get("num_labels") or 2))}
    try:
        names = {int(index): str(name) for index, name in given.items()}
        ids = {str(name): int(index) for name, index in (config.get("label2id") or {}).items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise CompressError("`id2label` or `label2id` of config.json is no mapping of labels") from None
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
    """The id that a label of a file says: one of the names, or the integer itself; None for what is neither."""
    if isinstance(value, str) and value.strip() in names:
        return names[value.strip()]
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]+\s*", value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():  # how parquet keeps integers of a column with gaps
        value = int(value)
    known = isinstance(value, int) and not isinstance(value, bool) and value in names.values()
    return int(value) if known else None


def score(value: Any) -> float | None:
    """The finite number that a score of a file says, None where it says none."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
