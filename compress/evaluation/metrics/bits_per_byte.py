"""Bits per byte: the negative log-likelihood of the text in bits, over its UTF-8 bytes. Comparable across tokenizers."""

from __future__ import annotations

import math
from typing import Any

from compress.evaluation.metrics.base import Scored
from compress.evaluation.metrics.ratio import RatioMetric


class BitsPerByte(RatioMetric):
    """The sum of nats over ln 2, per byte."""

    name = "bits_per_byte"
    title = "bits per byte"
    place = 10
    evaluations = {"evaluation": ""}
    default = frozenset({"evaluation"})
    lower = True
    gate = "increase"
    help = "Bits per byte of the evaluation text."
    unit = "absolute"
    numerator = "nll"
    denominator = "bytes"

    def value(self, evaluation: Scored) -> float | None:
        rows = evaluation["documents"]
        size: int = sum(row["bytes"] for row in rows)
        return math.fsum(row["nll"] for row in rows) / math.log(2) / size

    def of(self, ratio: Any) -> Any:
        return ratio / math.log(2)
