"""Samples in which a passage comes again at a distance: without them, nothing shows that a window forgets how to copy."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.errors import DataError

if TYPE_CHECKING:
    import torch

    from compress.data.batches import Batches


@dataclass(frozen=True, eq=False)
class Repeated:
    """Samples, of which some end with a passage from their beginning.

    Attributes:
        batches: the samples. passages: whether a token is of such a passage, where it comes again, bool [samples, length].
    """

    batches: Batches
    passages: torch.Tensor

    def weights(self, repeat: float) -> torch.Tensor:
        """``repeat`` for the tokens of passages and 1 for all others, float64 [samples, length]."""
        return 1 + (repeat - 1) * self.passages.double()


def with_repeats(batches: Batches, share: float, window: int, seed: int) -> Repeated:
    """The samples, of which an even ``share`` repeat a passage from their beginning at their end, out of a window's reach.

    A sample of n tokens then ends with the tokens from its second on; the first may mark the beginning of the text. The
    passage has a fourth to a half of the sample's tokens, drawn by seed, or fewer where it would begin in the window's reach.

    Args:
        batches: token ids; padding is on the right. share: 0 to 1. window: tokens that a query sees, itself among them.

    Raises:
        DataError: no sample is longer than the window.
    """
    import torch

    lengths = [batches.ids.shape[1]] * len(batches.ids) if batches.mask is None else batches.mask.sum(1).tolist()
    if max(lengths) <= window:
        raise DataError(
            f"the longest calibration sample has {max(lengths)} tokens and fits into a window of {window}",
            where="data.calibration",
            fix=f"use samples of {4 * window} tokens, or at least {window + 1}",
        )
    draw, ids, done = random.Random(seed), batches.ids.clone(), 0.0
    passages = ids.new_zeros(ids.shape, dtype=torch.bool)
    for row, length in enumerate(lengths):
        most = min(length // 2, length - window - 1)
        done += share
        if done < 1 - 1e-9 or most < 1:
            continue
        done -= 1
        passage = draw.randint(min(length // 4, most) or 1, most)
        ids[row, length - passage : length] = ids[row, 1 : passage + 1].clone()
        passages[row, length - passage : length] = True
    return Repeated(replace(batches, ids=ids), passages)
