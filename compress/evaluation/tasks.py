"""What a model can be measured by, from the name of its class. Needs neither torch nor numpy."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from compress.errors import CompressError


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of model.

    Attributes:
        name: in words. suffix: how names of its classes end. metrics: read off text; ``default`` where none is named.
        labelled: whether it is measured on texts with labels.
    """

    name: str
    suffix: str
    metrics: tuple[str, ...]
    default: tuple[str, ...]
    labelled: bool


CLASSIFICATION = Task(
    "text classification",
    "ForSequenceClassification",
    ("accuracy", "f1", "agreement", "kl"),
    ("accuracy", "agreement"),
    labelled=True,
)
#: The last one takes every other class; models that are no language models are refused when they are loaded.
LANGUAGE = Task(
    "causal language modelling",
    "",
    ("bits_per_byte", "perplexity", "kl", "agreement"),
    ("bits_per_byte", "kl"),
    labelled=False,
)
TASKS = (CLASSIFICATION, LANGUAGE)
#: Metrics read off text, of any task.
TEXT_METRICS = frozenset(metric for task in TASKS for metric in task.metrics)


def task_of(class_name: str | None) -> Task:
    """The task of a stock class, by its name."""
    return next(task for task in TASKS if (class_name or "").endswith(task.suffix))


def check_metrics(class_name: str | None, metrics: Collection[str], *, labelled: bool | None) -> Task:
    """The task of a class, of which all ``metrics`` that are read off text must be.

    Args:
        labelled: whether the evaluation data have labels; None where there are none.

    Raises:
        CompressError: a metric is of another task, or the data are.
    """
    task = task_of(class_name)
    if wrong := [metric for metric in metrics if metric in TEXT_METRICS - set(task.metrics)]:
        raise CompressError(
            f"`{wrong[0]}` does not measure {task.name}, which {class_name or 'this model'} is for",
            fix=f"its metrics are {', '.join(task.metrics)}",
        )
    if labelled is not None and labelled != task.labelled and set(metrics) & TEXT_METRICS:
        says = "takes labelled files" if task.labelled else "takes text without labels"
        raise CompressError(
            f"{task.name}, which {class_name or 'this model'} is for, {says}",
            fix="name the columns of texts and labels: `text`, `label`" if task.labelled else "leave out `label`",
        )
    return task


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
    except (AttributeError, TypeError, ValueError):
        raise CompressError("`id2label` or `label2id` of config.json is no mapping of labels") from None
    problem = config.get("problem_type")
    if problem not in (None, "single_label_classification") or len(names) < 2:
        raise CompressError(
            f"accuracy needs a model that gives each text one of several labels, this one does {problem or 'regression'}"
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
