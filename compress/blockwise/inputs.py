"""The calibration samples of a run over the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Inputs:
    """Calibration samples.

    Attributes:
        values: the model's inputs by name, each with samples first, or with the rows of the first sample, then of the next.
        mask: which tokens of the first of them count, bool [samples, length]; None for all.
        target_mask: which tokens of ``decoder_input_ids`` count; None for all. Its length differs from that of the source,
            so that the length of a tensor tells which tokens it belongs to.
        per_sample: rows of every value that make one sample.
    """

    values: Mapping[str, torch.Tensor]
    mask: torch.Tensor | None = None
    target_mask: torch.Tensor | None = None
    per_sample: int = 1

    @property
    def length(self) -> int:
        """Tokens of one sample, padding included; of an image or of speech its values."""
        return next(iter(self.values.values())).shape[1:].numel()

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        values = next(iter(self.values.values()))
        return (values.numel() if self.mask is None else int(self.mask.sum())) // self.per_sample

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(next(iter(self.values.values()))) // self.per_sample

    def rows(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The model's arguments for those samples; padding is masked."""
        each = [row * self.per_sample + i for row in rows for i in range(self.per_sample)]
        picked = {name: value[each] for name, value in self.values.items()}
        # a decoder's padding is behind its tokens, which do not look ahead
        return picked if self.mask is None else {**picked, "attention_mask": self._of(self.mask, rows).long()}

    def apart(self, frames: int) -> Inputs:
        """The same where a decoder's texts are not as long as the encoder's hidden states, of ``frames`` positions.

        Masks tell by their lengths whose tokens they are. Where both lengths are the same, the texts get a token that does
        not count.
        """
        read = self.values.get("decoder_input_ids")
        masked = self.mask is not None or self.target_mask is not None
        if read is None or read.shape[1] != frames or not masked:
            return self
        own = torch.ones_like(read, dtype=torch.bool) if self.target_mask is None else self.target_mask
        longer = torch.cat([read, read[:, -1:]], 1)
        return replace(
            self,
            values={**self.values, "decoder_input_ids": longer},
            target_mask=torch.nn.functional.pad(own, (0, 1)),
        )

    @property
    def reads_text(self) -> bool:
        """Whether the model reads token ids and the like alone: no pixels, no features of sound."""
        return not any(value.is_floating_point() for value in self.values.values())

    def masks(self, rows: Sequence[int], lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Which tokens of those samples count: of a list's own tokens, bool [len(rows), length], then of the encoder's.

        Args:
            lengths: positions of hidden states in each list up to the one asked for. A model may pad texts itself, behind
                their tokens, as Longformer does to whole windows: such positions do not count. A decoder may read an
                encoder's outputs with them or without.
        """
        if len(lengths) == 1:
            widths = [(self.mask, lengths[0])]
        else:
            widths = [(self.target_mask, lengths[-1]), (self.mask, lengths[0]), (self.mask, 0)]
        return tuple(self._widened(self._of(mask, rows), length) for mask, length in widths if mask is not None)

    def _widened(self, mask: torch.Tensor, length: int) -> torch.Tensor:
        more = length - mask.shape[1]
        return torch.nn.functional.pad(mask, (0, more)) if more > 0 and self.reads_text else mask

    def _of(self, mask: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """A mask of those samples, of which all rows have the same."""
        return mask[[row * self.per_sample for row in rows]]
