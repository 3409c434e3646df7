"""Accuracy: the share of labelled examples whose most likely label is the true one."""

from __future__ import annotations

from compress.evaluation.metrics.base import Metric, Resampling, Scored, check_paired
from compress.statistics import Interval, accuracy_drop, share


class Accuracy(Metric):
    """The share of correct predictions. Its bounds are exact, not resampled."""

    name = "accuracy"
    title = "accuracy"
    place = 30
    evaluations = {"classification": ""}
    default = frozenset({"classification"})
    labelled = True
    gate = "score"
    help = "Share of labelled texts or images that are classified correctly."
    decimals = None

    def value(self, evaluation: Scored) -> float | None:
        right = _right(evaluation)
        return sum(right) / len(right)

    def level(self, evaluation: Scored, resampling: Resampling) -> Interval:
        right = _right(evaluation)
        return share(sum(right), len(right), resampling.confidence)

    def drop(self, before: Scored, after: Scored, resampling: Resampling) -> Interval:
        check_paired(before, after, tokens=False)
        right = [_right(evaluation) for evaluation in (before, after)]
        lost = sum(a and not b for a, b in zip(*right, strict=True))
        won = sum(b and not a for a, b in zip(*right, strict=True))
        return accuracy_drop(lost, won, len(right[0]), resampling.confidence)


def _right(evaluation: Scored) -> list[bool]:
    return [row["prediction"] == row["label"] for row in evaluation["documents"]]
