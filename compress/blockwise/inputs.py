"""The calibration samples of a run over the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Inputs:
    """Calibration samples.

    Attributes:
        values: the model's inputs by name, each with samples first.
        mask: which tokens of the first of them count, bool [samples, length]; None for all.
        target_mask: which tokens of ``decoder_input_ids`` count; None for all. Its length differs from that of ``mask``, so
            that the length of a tensor tells which tokens it belongs to.
    """

    values: Mapping[str, torch.Tensor]
    mask: torch.Tensor | None = None
    target_mask: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of one sample, padding included; of an image or of speech its values."""
        return next(iter(self.values.values())).shape[1:].numel()

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return next(iter(self.values.values())).numel() if self.mask is None else int(self.mask.sum())

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(next(iter(self.values.values())))

    def rows(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The model's arguments for those samples; padding is masked."""
        picked = {name: value[list(rows)] for name, value in self.values.items()}
        # a decoder's padding is behind its tokens, which do not look ahead
        return picked if self.mask is None else {**picked, "attention_mask": self.mask[list(rows)].long()}

    def masks(self, rows: Sequence[int], place: int) -> tuple[torch.Tensor, ...]:
        """Which tokens of those samples count: of the blocks in that list, bool [len(rows), length], then of other lists."""
        order = (self.mask, self.target_mask) if place == 0 else (self.target_mask, self.mask)
        return tuple(mask[list(rows)] for mask in order if mask is not None)
