"""The whole model over calibration samples: one loop, and one way to leave padding out, for all that sums over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from compress.sensitivity.labels import draw

if TYPE_CHECKING:
    from compress.data.batches import Batches
    from compress.progress import Progress


@dataclass(frozen=True)
class Sample:
    """One or several samples that run together.

    Attributes:
        inputs: the model's arguments, on its device.
        mask: which of the tokens count that are predicted, bool [samples, length]; None for all.
        source: the same for what an encoder reads in front of a decoder, whose number differs. paired: whether there is one.
    """

    inputs: dict[str, torch.Tensor]
    mask: torch.Tensor | None
    source: torch.Tensor | None = None
    paired: bool = False

    def counted(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of tokens that count, [tokens, …].

        Args:
            rows: one for each token, [samples * length, …]; or one for each sample (a classifier's), which all count.
        """
        if self.source is not None and len(rows) == self.source.numel():
            return rows[self.source.flatten()]
        single = self.mask is not None and (self.paired or len(rows) == len(self.mask))
        if self.mask is None or (single and len(rows) != self.mask.numel()):
            return rows
        return rows[self.mask.flatten()]


class SampleLoop:
    """Calibration samples, about ``tokens`` tokens at a time, at least one sample.

    Attributes:
        current: what runs now; hooks on the model's modules ask it which tokens count.
    """

    current: Sample

    def __init__(self, batches: Batches, device: Any, *, tokens: int = 1) -> None:
        self._parts, self._device = batches.parts(tokens), device

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Sample]:
        for part in self._parts:
            mask, target = (None if m is None else m.to(self._device) for m in (part.mask, part.target_mask))
            paired = part.targets is not None
            self.current = Sample(
                part.inputs(self._device), target if paired else mask, mask if paired else None, paired
            )
            yield self.current

    def with_progress(self, progress: Progress, title: str, unit: str = "samples") -> Iterator[Sample]:
        """Iterate, and advance a progress bar."""
        with progress.task(title, len(self), unit) as task:
            for sample in self:
                yield sample
                task.advance()


def token_losses(model: Any, sample: Sample, generator: torch.Generator, *, next_token: bool = False) -> torch.Tensor:
    """Losses of a model's predictions of labels drawn from them, float32 [tokens that count].

    A model that predicts one label per sample has one loss per sample.

    Args:
        next_token: the loss of the next token instead, where the model predicts one for each position.

    Raises:
        CheckpointError: NaN or infinite logits.
    """
    logits: torch.Tensor = model(**sample.inputs)[0].float()
    if next_token and logits.ndim == 3:
        labels = sample.inputs["decoder_input_ids" if "decoder_input_ids" in sample.inputs else "input_ids"]
        labels = labels[:, 1:].flatten()
        losses = cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="none")
        return losses if sample.mask is None else losses[sample.mask[:, 1:].flatten()]
    logits = logits.flatten(0, -2)
    return sample.counted(cross_entropy(logits, draw(logits, generator), reduction="none"))
