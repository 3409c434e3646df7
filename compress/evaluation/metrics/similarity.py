"""Similarity: the mean cosine between sentence embeddings and the original's."""

from __future__ import annotations

from compress.evaluation.metrics.base import Resampling, Scored
from compress.evaluation.metrics.ratio import RatioMetric, drop_from_one
from compress.statistics import Interval


class Similarity(RatioMetric):
    """The mean cosine to the original's embedding of the same text."""

    name = "similarity"
    title = "similarity"
    row = "similarity to the original"
    place = 50
    evaluations = {"embeddings": "Mean cosine to the original's."}
    default = frozenset({"embeddings"})
    compares = True
    nullable = True
    gate = "score"
    help = "Mean cosine similarity of sentence embeddings to the original's. A drop is counted from 1."
    numerator = "similarity"

    def drop(self, before: Scored, after: Scored, resampling: Resampling) -> Interval:
        return drop_from_one(self.level(after, resampling))

    def cells(self, before: Scored, after: Scored) -> tuple[str, str, str, str] | None:
        value = after.get(self.name)
        return None if value is None else (self.row, "1", self.text(value), "mean cosine")
