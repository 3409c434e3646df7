"""Agreement: the share of tokens or examples at which the model's most likely prediction is the original's."""

from __future__ import annotations

from compress.evaluation.metrics.base import Resampling, Scored, column, is_examples
from compress.evaluation.metrics.ratio import RatioMetric, drop_from_one
from compress.statistics import Interval, share


class Agreement(RatioMetric):
    """The share of equal top predictions. On examples its bounds are exact, not resampled."""

    name = "agreement"
    title = "agreement"
    place = 80
    evaluations = {
        "evaluation": "Share of tokens.",
        "classification": "Share of texts or images.",
        "masked": "Share of masked tokens.",
    }
    default = frozenset({"classification"})
    compares = True
    nullable = True
    gate = "agreement"
    help = "Share of tokens, or of texts, with the same top prediction as the original."
    decimals = None
    numerator = "agree"

    def level(self, evaluation: Scored, resampling: Resampling) -> Interval:
        if is_examples(evaluation):
            agree = column(evaluation, self.numerator)
            return share(int(agree.sum()), len(agree), resampling.confidence)
        return super().level(evaluation, resampling)

    def drop(self, before: Scored, after: Scored, resampling: Resampling) -> Interval:
        return drop_from_one(self.level(after, resampling))

    def cells(self, before: Scored, after: Scored) -> tuple[str, str, str, str] | None:
        if (value := after.get(self.name)) is None:
            return None
        name = "agreement with the original" if is_examples(after) else "top-1 agreement"
        return name, "100%", self.text(value), ""
