"""The teachers of a student: one model or several, at work beside it, or what they said, read from a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.training.chunks import chunk_rows
from compress.training.divergence import bucketed, ensemble
from compress.training.features import FeatureModel, HeadKind
from compress.training.objective import Batch, Signal, Terms


class TeacherSignal(Protocol):
    """Whatever tells what teachers say of a batch."""

    def __call__(self, batch: Batch) -> Signal:
        """What they say."""
        ...


@dataclass
class Teachers:
    """Models whose probabilities are averaged by weight. The first one alone shows hidden states and attention.

    ``vocabulary``: ids shared with the student.
    """

    readers: Sequence[FeatureModel]
    weights: Sequence[float]
    terms: Terms
    vocabulary: int

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Signal:
        """One forward pass of each."""
        if not self.terms.of_distribution:
            return Signal(None, self.readers[0].run(batch.inputs))
        runs = [reader.run(batch.inputs) for reader in self.readers]
        hidden = [
            reader.predicted(output, batch.inputs, batch.predict)
            for reader, output in zip(self.readers, runs, strict=True)
        ]

        @torch.no_grad()
        def distribution(part: slice) -> tuple[Tensor, None]:
            return self.log_probabilities([h[part] for h in hidden]), None

        return Signal(distribution, runs[0] if self.terms.of_inside else None)

    def log_probabilities(self, hidden: Sequence[Tensor]) -> Tensor:
        """Of the ensemble, [n, V] float32, from what each teacher's `FeatureModel.predicted` gave."""
        members = []
        for reader, rows in zip(self.readers, hidden, strict=True):
            shared, temperature = reader.head(rows)[:, : self.vocabulary].float(), self.terms.temperature
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


def reader_of(model: Any, task: HeadKind, terms: Terms) -> FeatureModel:
    """A teacher's reader, frozen, which keeps what the terms compare with."""
    model.requires_grad_(False)
    model.eval()
    vectors = () if terms.vectors is None else (terms.vectors[1],)
    return FeatureModel(model, task, [t for _, t in terms.states], vectors)
