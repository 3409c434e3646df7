"""KL divergence of the original's predictions from the model's, in nats per token or per labelled example."""

from __future__ import annotations

from compress.evaluation.metrics.base import Scored, is_examples
from compress.evaluation.metrics.ratio import RatioMetric


class KL(RatioMetric):
    """The mean KL(original ‖ model)."""

    name = "kl"
    title = "KL"
    place = 70
    evaluations = {
        "evaluation": "Mean per token, nats.",
        "classification": "Mean per text or image, nats.",
        "masked": "Mean per masked token, nats.",
    }
    default = frozenset({"evaluation", "masked"})
    lower = True
    compares = True
    nullable = True
    gate = "divergence"
    help = "KL divergence of the original's predictions from the result's."
    unit = "nats"
    numerator = "kl"

    def cells(self, before: Scored, after: Scored) -> tuple[str, str, str, str] | None:
        if (value := after.get(self.name)) is None:
            return None
        unit = after.get("of", "texts")[:-1] if is_examples(after) else "token"
        return "KL from the original", "0", self.text(value), f"nats per {unit}"
