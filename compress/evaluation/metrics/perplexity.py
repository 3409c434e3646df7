"""Perplexity: the exponential of the mean negative log-likelihood per scored token."""

from __future__ import annotations

import math
from typing import Any

from compress.evaluation.metrics.base import Scored
from compress.evaluation.metrics.ratio import RatioMetric

#: Nats per token whose exponential float64 still holds.
_MOST = 700


class Perplexity(RatioMetric):
    """The exponential of nats per token; infinite beyond what float64 holds."""

    name = "perplexity"
    title = "perplexity"
    place = 20
    evaluations = {"evaluation": "Per token.", "masked": "Per masked token."}
    default = frozenset({"masked"})
    lower = True
    gate = "increase"
    help = "Perplexity per token of the evaluation text."
    unit = "absolute"
    decimals = 2
    numerator = "nll"

    def value(self, evaluation: Scored) -> float | None:
        rows = evaluation["documents"]
        nats = math.fsum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows)
        return math.exp(nats) if nats < _MOST else math.inf if nats == nats else math.nan

    def of(self, ratio: Any) -> Any:
        import numpy as np

        with np.errstate(over="ignore"):
            return np.exp(ratio)
