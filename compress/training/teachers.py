"""Teachers of a student: one model or several that run beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.evaluation.tasks import Task
from compress.training.chunked_logits import chunk_rows
from compress.training.divergence import bucketed, ensemble
from compress.training.features import FeatureModel
from compress.training.objective import Batch, Signal, Terms


class TeacherSignal(Protocol):
    """Source of the teachers' predictions: models that run beside the student, or a cache."""

    def __call__(self, batch: Batch) -> Signal:
        """The teachers' output for a batch."""
        ...


@dataclass
class Teachers:
    """An ensemble: probabilities are averaged by weight. Hidden states and attention are those of the first teacher.

    ``vocabulary``: number of ids shared with the student.
    """

    models: Sequence[FeatureModel]
    weights: Sequence[float]
    terms: Terms
    vocabulary: int

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Signal:
        """Run each teacher once."""
        if not self.terms.of_distribution:
            return Signal(None, self.models[0].run(batch.inputs))
        runs = [model.run(batch.inputs) for model in self.models]
        hidden = [
            model.predicted(output, batch.inputs, batch.predict)
            for model, output in zip(self.models, runs, strict=True)
        ]

        @torch.no_grad()
        def distribution(part: slice) -> tuple[Tensor, None]:
            return self.log_probabilities([h[part] for h in hidden]), None

        return Signal(distribution, runs[0] if self.terms.of_inside else None)

    def log_probabilities(self, hidden: Sequence[Tensor]) -> Tensor:
        """Log-probabilities of the ensemble [n, V], float32, from each teacher's `FeatureModel.predicted`."""
        members = []
        for model, rows in zip(self.models, hidden, strict=True):
            shared, temperature = model.head(rows)[:, : self.vocabulary].float(), self.terms.temperature
            members.append((shared if temperature == 1 else shared / temperature).log_softmax(-1))
        return ensemble(members, list(self.weights))

    @torch.no_grad()
    def top_k(self, batch: Batch, k: int) -> tuple[Tensor, Tensor]:
        """Ids [N, k] of the k likeliest tokens, and log-probabilities [N, k + 1] of these and of all others together."""
        signal = self(batch)
        assert signal.distribution is not None
        count = int(batch.predict.sum())
        rows = chunk_rows(self.vocabulary, batch.predict.device)
        ids, values = [], []
        for start in range(0, count, rows):
            log_probabilities, _ = signal.distribution(slice(start, start + rows))
            top = log_probabilities.topk(k, dim=1).indices.sort(1).values
            ids.append(top)
            values.append(bucketed(log_probabilities, top))
        if not ids:
            return torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k + 1)
        return torch.cat(ids), torch.cat(values)


def frozen_teacher(model: Any, task: Task, terms: Terms) -> FeatureModel:
    """A frozen teacher that keeps the features that ``terms`` compare."""
    model.requires_grad_(False)
    model.eval()
    vectors = () if terms.vectors is None else (terms.vectors[1],)
    return FeatureModel(model, task, [t for _, t in terms.states], vectors)
