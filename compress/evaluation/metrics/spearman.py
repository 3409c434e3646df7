"""Spearman's rank correlation between the cosines of sentence pairs and their scores."""

from __future__ import annotations

from typing import Any

from compress.evaluation.metrics.base import Metric, Resampling, Scored, check_paired, column
from compress.statistics import Interval, correlation, rank_correlation


class Spearman(Metric):
    """The rank correlation; ties get mean ranks."""

    name = "spearman"
    title = "Spearman"
    place = 60
    evaluations = {"embeddings": "Rank correlation of cosines and scores."}
    default = frozenset({"embeddings"})
    labelled = True
    nullable = True
    gate = "score"
    help = "Spearman's rank correlation between the cosine similarities of sentence pairs and their scores."

    def value(self, evaluation: Scored) -> float | None:
        pairs = [(row["cosine"], row["score"]) for row in evaluation["documents"]]
        scored = [pair for pair in pairs if None not in pair]
        return rank_correlation(*zip(*scored, strict=True)) if scored else None

    def level(self, evaluation: Scored, resampling: Resampling) -> Interval:
        return resampling.draws(_correlation(evaluation), len(evaluation["documents"]))

    def drop(self, before: Scored, after: Scored, resampling: Resampling) -> Interval:
        check_paired(before, after, tokens=False)
        first, second = _correlation(before), _correlation(after)
        return resampling.draws(lambda counts: 100 * (first(counts) - second(counts)), len(before["documents"]))


def _correlation(evaluation: Scored) -> Any:
    return correlation(column(evaluation, "cosine"), column(evaluation, "score"))
