"""Batches of training samples: which samples each step takes, and what is masked. All of it follows from the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from compress.data.batches import Batches
from compress.evaluation.tasks import LANGUAGE, MASKED, Task
from compress.training.objective import Batch

#: Share of tokens that masked language modelling predicts; of these the shares that are masked, and replaced by random tokens
#: (BERT, arXiv 1810.04805).
_SHARE, _MASKED, _REPLACED = 0.15, 0.8, 0.1
#: Number of batches whose samples are sorted by length together, if lengths differ.
POOL = 16


@dataclass(frozen=True)
class Masking:
    """How tokens are masked.

    Attributes:
        mask: id of the mask token.
        special: ids that are never masked.
        fixed: mask the same tokens in every epoch.
    """

    mask: int
    special: frozenset[int]
    vocabulary: int
    seed: int
    fixed: bool = False


@dataclass
class Order:
    """The samples of every step. The first epoch keeps their order (they were drawn at random); later ones are shuffled.

    Attributes:
        samples: number of samples.
        batch: samples per step.
        lengths: length of each sample if they differ; then samples of similar length share a step.
    """

    samples: int
    batch: int
    seed: int
    lengths: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._epoch = lru_cache(2)(self._shuffled)

    def step(self, step: int) -> list[tuple[int, int]]:
        """Pairs (sample, epoch) of a step, from 0."""
        samples = []
        for place in range(step * self.batch, (step + 1) * self.batch):
            epoch, at = divmod(place, self.samples)
            samples.append((self._epoch(epoch)[at], epoch))
        return samples

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(self.samples))
        generator = random.Random(f"{self.seed}.{epoch}")
        if epoch:
            generator.shuffle(order)
        if self.lengths is None:
            return order
        pooled = []
        for start in range(0, self.samples, POOL * self.batch):
            pool = sorted(order[start : start + POOL * self.batch], key=lambda i: self.lengths[i])  # type: ignore[index]
            batches = [pool[i : i + self.batch] for i in range(0, len(pool), self.batch)]
            last = [batches.pop()] if len(batches[-1]) < self.batch else []
            generator.shuffle(batches)
            pooled += [i for one in batches + last for i in one]
        return pooled


@dataclass(frozen=True)
class Samples:
    """All samples of a run, the held-out ones last.

    Attributes:
        batches: ids, masks, token types and labels; an image counts as one token.
        held_out: number of samples at the end that are not trained on.
    """

    batches: Batches
    task: Task
    held_out: int
    masking: Masking | None = None

    @property
    def train(self) -> int:
        """Number of samples that are trained on."""
        return len(self.batches.ids) - self.held_out

    @property
    def held(self) -> list[tuple[int, int]]:
        """The held-out samples, as pairs like those of `Order.step`."""
        return [(row, 0) for row in range(self.train, len(self.batches.ids))]

    def order(self, batch: int, seed: int) -> Order:
        """Order of the training samples, with ``batch`` samples per step."""
        mask = self.batches.mask if self.batches.targets is None else self.batches.target_mask
        lengths = None if mask is None else mask.sum(1).tolist()
        return Order(self.train, batch, seed, lengths if lengths and len(set(lengths)) > 1 else None)

    def counts(self, taken: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Number of tokens of these samples, and number of predicted ones."""
        rows = torch.tensor([row for row, _ in taken])
        mask = self._mask(rows)
        if self.task is LANGUAGE:
            return int(mask.sum()), int((mask[:, :-1] & mask[:, 1:]).sum())
        if self.task is MASKED:
            return int(mask.sum()), sum(len(self._places(row, epoch)) for row, epoch in taken)
        return int(mask.sum()), len(taken)

    def batch(
        self, taken: Sequence[tuple[int, int]], counts: tuple[int, int], device: str, size: int | None = None
    ) -> Batch:
        """These samples as a batch, padded to ``size`` samples; ``counts`` are those of the whole step."""
        filling = (size or len(taken)) - len(taken)
        rows = torch.tensor([row for row, _ in taken] + [-1] * filling, dtype=torch.long)
        # padding repeats a sample that does not count
        source = torch.where(rows < 0, torch.zeros_like(rows), rows)
        mask = self._mask(source)
        longest = int(mask.sum(1).max())
        ids, mask = self._tokens[source, :longest].clone(), mask[:, :longest]
        counted = mask & (rows >= 0)[:, None]
        inputs = self._inputs(source, ids, mask)
        if self.task is LANGUAGE:
            predict = torch.zeros_like(counted)
            predict[:, :-1] = counted[:, :-1] & counted[:, 1:]
            targets = ids.roll(-1, 1)[predict]
        elif self.task is MASKED:
            predict, targets = self._hide(ids, taken)
        else:
            predict = rows >= 0
            labels = self.batches.labels
            targets = torch.zeros(len(taken), dtype=torch.long) if labels is None else labels[source][predict]
        to = {name: value.to(device) for name, value in inputs.items()}
        return Batch(to, counted.to(device), predict.to(device), targets.to(device), rows, *counts)

    @property
    def _tokens(self) -> torch.Tensor:
        """The ids that are predicted: those that a decoder reads, or all."""
        return self.batches.ids if self.batches.targets is None else self.batches.targets

    def _mask(self, rows: torch.Tensor) -> torch.Tensor:
        """Which of these ids count."""
        mask = self.batches.mask if self.batches.targets is None else self.batches.target_mask
        return torch.ones(len(rows), self._tokens.shape[1], dtype=torch.bool) if mask is None else mask[rows]

    def _inputs(self, rows: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's arguments for samples with these ids to predict."""
        batches = self.batches
        if batches.images is not None:
            return {"pixel_values": batches.images(ids[:, 0].tolist())}
        if batches.targets is not None:
            masked = {} if batches.mask is None else {"attention_mask": batches.mask[rows].long()}
            return {"input_ids": batches.ids[rows], "decoder_input_ids": ids, **masked}
        inputs = {"input_ids": ids}
        if batches.mask is not None:
            inputs["attention_mask"] = mask.long()
        if batches.types is not None:
            inputs["token_type_ids"] = batches.types[rows, : ids.shape[1]]
        return inputs

    def _generator(self, purpose: str, row: int, epoch: int) -> random.Random:
        assert self.masking is not None
        return random.Random(f"{purpose}{self.masking.seed}.{row}.{0 if self.masking.fixed else epoch}")

    def _places(self, row: int, epoch: int) -> list[int]:
        """Positions of a sample's predicted tokens."""
        assert self.masking is not None
        ids = self.batches.ids[row].tolist()
        length = len(ids) if self.batches.mask is None else int(self.batches.mask[row].sum())
        candidates = [at for at in range(length) if ids[at] not in self.masking.special]
        if not candidates:
            return []
        return sorted(self._generator("", row, epoch).sample(candidates, max(1, round(_SHARE * len(candidates)))))

    def _hide(self, ids: torch.Tensor, taken: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask tokens of the samples in ``ids`` [B, L]. Returns their positions (bool [B, L]) and original ids [N]."""
        masking = self.masking
        assert masking is not None
        places = [self._places(row, epoch) for row, epoch in taken]
        predict = torch.zeros_like(ids, dtype=torch.bool)
        for i, positions in enumerate(places):
            predict[i, positions] = True
        targets = ids[predict]
        for i, (row, epoch) in enumerate(taken):
            generator = self._generator("hide.", row, epoch)
            for at in places[i]:
                kind = generator.random()
                if kind < _MASKED:
                    ids[i, at] = masking.mask
                elif kind < _MASKED + _REPLACED:
                    ids[i, at] = generator.randrange(masking.vocabulary)
        return predict, targets
