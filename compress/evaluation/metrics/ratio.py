"""Metrics that are a function of one ratio of sums, such as nats per token."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from compress.evaluation.metrics.base import (
    Metric,
    Resampling,
    Scored,
    check_paired,
    column,
    is_examples,
    same_tokens,
)
from compress.statistics import Interval


class RatioMetric(Metric):
    """A function (`of`) of the sum of ``numerator`` over the sum of ``denominator``, or per example.

    Attributes:
        numerator, denominator: keys of rows. Rows of examples count one each.
    """

    numerator: ClassVar[str]
    denominator: ClassVar[str] = "tokens"

    def of(self, ratio: Any) -> Any:
        """The metric of a ratio, or of an array of ratios."""
        return ratio

    def value(self, evaluation: Scored) -> float | None:
        rows = evaluation["documents"]
        if any(row.get(self.numerator) is None for row in rows):
            return None
        count = len(rows) if is_examples(evaluation) else sum(row[self.denominator] for row in rows)
        return float(self.of(math.fsum(row[self.numerator] for row in rows) / count))

    def level(self, evaluation: Scored, resampling: Resampling) -> Interval:
        top = column(evaluation, self.numerator)
        if is_examples(evaluation):
            return resampling.sums(lambda sums: self.of(sums[0] / len(top)), [top])
        return resampling.sums(lambda sums: self.of(sums[0] / sums[1]), [top, column(evaluation, self.denominator)])

    def increase(self, before: Scored, after: Scored, resampling: Resampling, *, relative: bool) -> Interval:
        check_paired(before, after, tokens=self.denominator == "tokens")
        parts = (self.numerator, self.denominator)
        columns = [column(evaluation, part) for evaluation in (before, after) for part in parts]

        def change(sums: Any) -> Any:
            first, second = self.of(sums[0] / sums[1]), self.of(sums[2] / sums[3])
            return second / first - 1 if relative else second - first

        return resampling.sums(change, columns)

    def paired(self, before: Scored, after: Scored, resampling: Resampling) -> dict[str, float] | None:
        if not self.compares and self.denominator == "tokens" and not same_tokens(before, after):
            return None
        return super().paired(before, after, resampling)


def drop_from_one(level: Interval) -> Interval:
    """The points (1/100) by which a level lies below 1, the original's own level."""
    return Interval(100 * (1 - level.value), 100 * (1 - level.upper), 100 * (1 - level.lower), level.units)
