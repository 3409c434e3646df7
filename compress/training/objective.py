"""Objective of a student: the weighted sum of losses against a teacher and against labels.

B samples, L tokens, D width, V vocabulary, N predicted tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.evaluation.embeddings import Pooling, pooled
from compress.evaluation.tasks import EMBEDDING, LANGUAGE, Task
from compress.training.chunked_logits import chunk_rows, summed
from compress.training.divergence import DIVERGENCES, bucketed, skewed_kl
from compress.training.features import FeatureModel, ForwardOutput


@dataclass(frozen=True)
class Terms:
    """Losses and their parameters.

    Attributes:
        weights: weight by name of the loss: those of `DIVERGENCES`, ``labels``, ``hidden``, ``cosine``, ``relations``.
        temperature: of divergences.
        skew: share of the teacher in the mixture of ``skewed_kl``.
        states: pairs (student, teacher) of outputs that ``hidden`` compares; 0 is the embeddings, 1 the first block.
        vectors: pair of blocks, from 0, whose attention ``relations`` compares.
        relation_heads: number of heads that the vectors are split into.
    """

    weights: Mapping[str, float]
    temperature: float = 1.0
    skew: float = 0.1
    states: tuple[tuple[int, int], ...] = ()
    vectors: tuple[int, int] | None = None
    relation_heads: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the losses, in order."""
        return tuple(self.weights)

    @property
    def of_logits(self) -> bool:
        """Whether any loss reads logits."""
        return any(name in DIVERGENCES or name == "labels" for name in self.weights)

    @property
    def of_distribution(self) -> bool:
        """Whether any loss reads a teacher's probabilities."""
        return any(name in DIVERGENCES for name in self.weights)

    @property
    def of_inside(self) -> bool:
        """Whether any loss reads hidden states or attention of the teacher."""
        return any(name in self.weights for name in ("hidden", "cosine", "relations"))


@dataclass(frozen=True)
class Batch:
    """Some samples of one step.

    Attributes:
        inputs: arguments of the model, [B, L], or images [B, C, H, W], which count as one token each.
        counted: bool [B, L], tokens of real samples; False for padding.
        predict: bool [B, L], tokens whose logits count; [B] for a classifier.
        targets: int64 [N], labels of these tokens.
        rows: int64 [B], indices of the samples; -1 for padding.
        tokens: number of counted tokens in the whole step, over all of its batches.
        predicted: number of predicted tokens in the whole step.
    """

    inputs: dict[str, Tensor]
    counted: Tensor
    predict: Tensor
    targets: Tensor
    rows: Tensor
    tokens: int
    predicted: int


@dataclass
class Signal:
    """The teacher's output for a batch.

    Attributes:
        distribution: function from rows of the N predicted tokens to log-probabilities [n, V], or [n, k + 1] with ids [n, k].
        output: hidden states and vectors.
    """

    distribution: Callable[[slice], tuple[Tensor, Tensor | None]] | None = None
    output: ForwardOutput | None = None


class Objective(torch.nn.Module):
    """The student, its projections, which are discarded after training, and the loss.

    Args:
        vocabulary: number of ids that student and teachers share; further logits are ignored.
        teacher_width: width of the teacher's hidden states; a projection is trained if the student's differs.
        pooling: the student's pooling of sentence embeddings.
        teacher_pooling: the teacher's.
    """

    def __init__(
        self,
        student: Any,
        task: Task,
        terms: Terms,
        *,
        vocabulary: int,
        teacher_width: int | None = None,
        pooling: Pooling | None = None,
        teacher_pooling: Pooling | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.task = task
        self.terms = terms
        self.vocabulary = vocabulary
        self.pooling, self.teacher_pooling = pooling or Pooling(), teacher_pooling or Pooling()
        vectors = () if terms.vectors is None else (terms.vectors[0],)
        self.features = FeatureModel(student, task, [s for s, _ in terms.states], vectors)
        self.projections = torch.nn.ModuleDict()
        width = int(student.config.get_text_config().hidden_size)
        if teacher_width is None:
            return
        pairs = {f"state{i}": (width, teacher_width) for i in range(len(terms.states))}
        if "cosine" in terms.weights:
            mine, theirs = (len(p.modes) if task is EMBEDDING else 1 for p in (self.pooling, self.teacher_pooling))
            pairs["last"] = (mine * width, theirs * teacher_width)
        for name, (wide, other) in pairs.items():
            if wide != other:
                linear = torch.nn.Linear(wide, other, bias=False)
                torch.nn.init.orthogonal_(linear.weight)
                self.projections[name] = linear

    def forward(self, batch: Batch, signal: Signal, scale: float = 1.0) -> Tensor:
        """The total loss and each unweighted loss, [1 + losses]. Only the total has a gradient.

        Every value is this batch's share of the mean over the step: the shares of all batches add up to it. ``scale``
        multiplies gradients while they are narrow floats (see `chunked_logits.summed`).
        """
        output = self.features.run(batch.inputs)
        batch = _by_token(batch, output)
        parts: dict[str, Tensor] = {}
        if self.terms.of_logits:
            of_logits = self._predicted(batch, signal, output, scale)
            total = of_logits[0]
            parts |= dict(zip(self._logit_terms(), of_logits[1:], strict=True))
        else:
            # sharded blocks are gathered only for a backward pass that begins at their outputs
            total = output.last.float().sum() * 0
        for name, loss in (("hidden", self._hidden), ("cosine", self._cosine), ("relations", self._relations)):
            if name in self.terms.weights:
                assert signal.output is not None
                parts[name] = loss(batch, output, signal.output)
                total = total + self.terms.weights[name] * parts[name]
        return torch.stack([total, *(parts[name].detach().float() for name in self.terms.names)])

    def _logit_terms(self) -> list[str]:
        return [name for name in self.terms.names if name in DIVERGENCES or name == "labels"]

    def _predicted(self, batch: Batch, signal: Signal, output: ForwardOutput, scale: float) -> Tensor:
        """Weighted sum of the losses on logits, then each loss; shares of the step's means."""
        hidden = self.features.predicted(output, batch.inputs, batch.predict)
        head, parameters = self.features.head, self.features.parameters_of_head()
        names, terms = self._logit_terms(), self.terms

        def loss(logits: Tensor, part: slice) -> Tensor:
            whole = logits.float()
            logits = whole[:, : self.vocabulary]
            values = []
            if terms.of_distribution:
                assert signal.distribution is not None
                theirs, ids = signal.distribution(part)
                mine = (logits if terms.temperature == 1 else logits / terms.temperature).log_softmax(-1)
                mine = mine if ids is None else bucketed(mine, ids)
            for name in names:
                if name == "labels":
                    values.append(functional.cross_entropy(whole, batch.targets[part], reduction="sum"))
                elif name == "skewed_kl":
                    values.append(skewed_kl(theirs, mine, terms.skew).sum() * terms.temperature**2)
                else:
                    values.append(DIVERGENCES[name](theirs, mine).sum() * terms.temperature**2)
            return torch.stack([sum(terms.weights[n] * v for n, v in zip(names, values, strict=True)), *values])  # type: ignore[list-item]

        if not len(hidden):  # only padding: nothing to predict, but every process must take part
            nothing = hidden.sum() * 0 + sum(p.sum() * 0 for p in parameters)
            return torch.stack([nothing, *(hidden.new_zeros(()) for _ in names)])
        factor = 1 / max(1, batch.predicted)
        return summed(
            loss, head, hidden, parameters, chunk_rows(self.vocabulary, hidden.device), factor=factor, scale=scale
        )

    def _project(self, name: str, states: Tensor) -> Tensor:
        return self.projections[name](states) if name in self.projections else states

    def _hidden(self, batch: Batch, mine: ForwardOutput, theirs: ForwardOutput) -> Tensor:
        """Squared distance of hidden states over the teacher's square, mean over tokens and pairs (arXiv 1909.10351)."""
        errors = []
        for i, (s, t) in enumerate(self.terms.states):
            target = theirs.states[t][batch.counted].float()
            error = self._project(f"state{i}", mine.states[s][batch.counted]).float() - target
            errors.append((error.square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).sum())
        return torch.stack(errors).mean() / max(1, batch.tokens)

    def _cosine(self, batch: Batch, mine: ForwardOutput, theirs: ForwardOutput) -> Tensor:
        """1 - cosine of the last hidden states, mean over tokens (arXiv 1910.01108), or of sentence embeddings."""
        if self.task is EMBEDDING:
            present = batch.rows >= 0
            counted = batch.counted[present]
            a = self._project("last", pooled(mine.last[present].float(), counted, self.pooling))
            b = pooled(theirs.last[present].float(), counted, self.teacher_pooling)
            return (1 - functional.cosine_similarity(a, b, dim=-1)).sum() / max(1, batch.predicted)
        a, b = self._project("last", mine.last[batch.counted]).float(), theirs.last[batch.counted].float()
        return (1 - functional.cosine_similarity(a, b, dim=-1)).sum() / max(1, batch.tokens)

    def _relations(self, batch: Batch, mine: ForwardOutput, theirs: ForwardOutput) -> Tensor:
        """KL of relations among queries, keys and values, mean over tokens, heads and the three (MiniLMv2, 2012.15828)."""
        assert self.terms.vectors is not None
        student, teacher = self.terms.vectors
        causal = self.task is LANGUAGE
        divergences = []
        for a, b in zip(mine.vectors[student], theirs.vectors[teacher], strict=True):
            p, q = (_relation(v, self.terms.relation_heads, batch.counted, causal) for v in (b, a))
            divergence = torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(-1).mean(1)  # [B, L]
            divergences.append(divergence[batch.counted].sum())
        return torch.stack(divergences).mean() / max(1, batch.tokens)


def _by_token(batch: Batch, output: ForwardOutput) -> Batch:
    """For images: count every token that the model makes of one."""
    inside = [*output.states.values(), *(one for each in output.vectors.values() for one in each)]
    if "pixel_values" not in batch.inputs or not inside:
        return batch
    length = inside[0].shape[1]
    return replace(batch, counted=batch.counted.expand(-1, length), tokens=batch.tokens * length)


def _relation(vectors: Tensor, heads: int, counted: Tensor, causal: bool) -> Tensor:
    """Log of softmax(v vᵀ / √d) over tokens that count, [B, heads, L, L], of vectors [B, L, heads · d]."""
    split = vectors.float().view(*vectors.shape[:-1], heads, -1).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / math.sqrt(split.shape[-1])
    length = scores.shape[-1]
    allowed = counted[:, None, None, :]
    if causal:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    # a token sees itself, so that rows of padding are finite
    allowed = allowed | torch.eye(length, dtype=torch.bool, device=scores.device)
    result: Tensor = scores.masked_fill(~allowed, -math.inf).log_softmax(-1)
    return result
