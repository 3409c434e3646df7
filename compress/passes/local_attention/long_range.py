"""Samples in which a passage comes again at a distance: without them, nothing shows that a window forgets how to copy."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from compress.errors import DataError

if TYPE_CHECKING:
    from compress.data.batches import Batches


def with_repeats(batches: Batches, share: float, window: int, seed: int) -> Batches:
    """The samples, of which an even ``share`` repeat a passage from their beginning at their end, out of a window's reach.

    A sample of n tokens then ends with the tokens from its second on; the first may mark the beginning of the text. The
    passage has a fourth to a half of the sample's tokens, drawn by seed, or fewer where it would begin in the window's reach.

    Args:
        batches: token ids; padding is on the right. share: 0 to 1. window: tokens that a query sees, itself among them.

    Raises:
        DataError: no sample is longer than the window.
    """
    lengths = [batches.ids.shape[1]] * len(batches.ids) if batches.mask is None else batches.mask.sum(1).tolist()
    if max(lengths) <= window:
        raise DataError(
            f"the longest calibration sample has {max(lengths)} tokens and fits into a window of {window}",
            where="data.calibration",
            fix=f"use samples of {4 * window} tokens, or at least {window + 1}",
        )
    draw, ids, done = random.Random(seed), batches.ids.clone(), 0.0
    for row, length in enumerate(lengths):
        most = min(length // 2, length - window - 1)
        done += share
        if done < 1 - 1e-9 or most < 1:
            continue
        done -= 1
        passage = draw.randint(min(length // 4, most) or 1, most)
        ids[row, length - passage : length] = ids[row, 1 : passage + 1].clone()
    return replace(batches, ids=ids)
