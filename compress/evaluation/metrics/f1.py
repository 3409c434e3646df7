"""Macro F1: the mean over labels of 2 TP / (2 TP + FP + FN)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress.evaluation.metrics.base import Metric, Resampling, Scored, check_paired
from compress.statistics import Interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class F1(Metric):
    """The mean F1 of the labels that some example has or is given."""

    name = "f1"
    title = "macro F1"
    place = 40
    evaluations = {"classification": "Mean of the labels' F1, of those that some example has or is given."}
    labelled = True
    gate = "score"
    help = "Macro F1: the mean of the labels' F1, on labelled texts or images."
    decimals = None

    def value(self, evaluation: Scored) -> float | None:
        return macro_f1(evaluation["documents"], len(evaluation["labels"]))

    def level(self, evaluation: Scored, resampling: Resampling) -> Interval:
        return resampling.sums(_f1_of, _label_counts(evaluation["documents"], len(evaluation["labels"])))

    def drop(self, before: Scored, after: Scored, resampling: Resampling) -> Interval:
        check_paired(before, after, tokens=False)
        labels = len(before["labels"])
        columns = [column for side in (before, after) for column in _label_counts(side["documents"], labels)]
        half = len(columns) // 2
        return resampling.sums(lambda sums: 100 * (_f1_of(sums[:half]) - _f1_of(sums[half:])), columns)


def macro_f1(rows: Sequence[Mapping[str, Any]], labels: int) -> float:
    """Mean F1 over the labels that some row has as ``label`` or ``prediction``; ``labels``: number of labels."""
    return float(_f1_of([column.sum() for column in _label_counts(rows, labels)]))


def _label_counts(rows: Sequence[Mapping[str, Any]], labels: int) -> list[NDArray[np.float64]]:
    """Two columns per label, all of the first kind first: TP of each row, then 2 TP + FP + FN of each row."""
    import numpy as np

    truth, predicted = (np.array([row[key] for row in rows]) for key in ("label", "prediction"))
    has = [(truth == label).astype(np.float64) for label in range(labels)]
    given = [(predicted == label).astype(np.float64) for label in range(labels)]
    return [a * b for a, b in zip(has, given, strict=True)] + [a + b for a, b in zip(has, given, strict=True)]


def _f1_of(sums: Any) -> Any:
    """Macro F1 of the sums of `_label_counts`, [2 labels] or [2 labels, draws]."""
    import numpy as np

    sums = np.asarray(sums)
    half = len(sums) // 2
    hits, total = sums[:half], sums[half:]
    each = 2 * hits / np.maximum(total, 1)
    return each.sum(0) / np.maximum((total > 0).sum(0), 1)
