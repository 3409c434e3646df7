"""Keep-masks by weight magnitude. Masks are bool, True where a weight is kept.

An earlier mask is obeyed: weights that it removed score below all others. Of equal magnitudes the first in row-major order are
kept, so that masks do not depend on the machine's sorting.

Sources: Han et al. 2015 (arXiv 1506.02626); N:M, Mishra et al. 2021 (arXiv 2104.08378).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

#: Bits of the first histogram for a global threshold. float32 magnitudes compare as their bit patterns do.
_HIGH_BITS = 16


class MaskedTensor(Protocol):
    """Values and an optional keep-mask of the same shape."""

    @property
    def data(self) -> torch.Tensor:
        """The values."""
        ...

    @property
    def mask(self) -> torch.Tensor | None:
        """True where a weight is kept."""
        ...


def scores(values: torch.Tensor, earlier: torch.Tensor | None) -> torch.Tensor:
    """Return int32 keys in the order of |w|, of the shape of ``values``; -1 for weights that an earlier mask removed.

    float64 values are rounded to float32 first.
    """
    keys = values.abs().to(torch.float32).contiguous().view(torch.int32)
    return keys if earlier is None else torch.where(earlier, keys, -1)


def keep_largest(values: torch.Tensor, kept: int, earlier: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mask that keeps exactly ``kept`` weights, the largest, of a tensor of any shape.

    Fewer are kept if ``earlier`` keeps fewer.
    """
    flat = scores(values, earlier).flatten()
    if kept == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = torch.kthvalue(flat, flat.numel() - kept + 1).values
    mask = flat > threshold
    ties = torch.nonzero(flat == threshold).flatten()[: kept - int(mask.sum())]
    mask[ties] = True
    if earlier is not None:
        mask &= earlier.flatten()
    return mask.reshape(values.shape)


def keep_n_of_m(
    values: torch.Tensor, n: int, m: int, axis: int = -1, earlier: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mask that keeps the ``n`` largest of every ``m`` consecutive weights along ``axis``, which ``m`` divides."""
    moved = scores(values, earlier).movedim(axis, -1)
    groups = moved.reshape(-1, m)
    # stable: of equal magnitudes the first are kept
    best = torch.sort(groups, dim=-1, descending=True, stable=True).indices[:, :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True) & (groups >= 0)
    return mask.reshape(moved.shape).movedim(-1, axis).contiguous()


def global_counts(
    read: Callable[[str], MaskedTensor],
    names: Sequence[str],
    kept: int,
    advance: Callable[[str], None] = lambda name: None,
) -> dict[str, int]:
    """Return how many weights of each tensor one global threshold keeps; ``kept`` in total, exactly.

    The threshold is found in two reads of the tensors, by a histogram of the upper and one of the lower half of the
    magnitudes' bits, so only one tensor is in memory. Weights equal to the threshold are kept in the order of ``names``.

    Args:
        read: tensor name ▶ its values and keep-mask.
        names: the tensors.
        kept: weights to keep over all tensors; all if that many are not left.
        advance: called with a tensor's name after each read.
    """
    low_bits = 32 - _HIGH_BITS
    high = torch.zeros(1 << _HIGH_BITS, dtype=torch.int64)
    for name in names:
        keys = _alive(read(name))
        high += torch.bincount(keys >> low_bits, minlength=high.numel())
        advance(name)
    alive = int(high.sum())
    if kept >= alive:
        return {name: int(_alive(read(name)).numel()) for name in names}
    bucket, above = _descend(high, kept)
    low = torch.zeros(1 << low_bits, dtype=torch.int64)
    over: dict[str, int] = {}
    within: dict[str, torch.Tensor] = {}
    for name in names:
        keys = _alive(read(name))
        over[name] = int((keys >> low_bits > bucket).sum())
        within[name] = keys[keys >> low_bits == bucket] & ((1 << low_bits) - 1)
        low += torch.bincount(within[name], minlength=low.numel())
        advance(name)
    value, more = _descend(low, kept - above)
    left = kept - above - more
    counts = {}
    for name in names:
        ties = min(left, int((within[name] == value).sum()))
        left -= ties
        counts[name] = over[name] + int((within[name] > value).sum()) + ties
    return counts


def _alive(value: MaskedTensor) -> torch.Tensor:
    keys = scores(value.data, value.mask).flatten()
    return keys[keys >= 0]


def _descend(histogram: torch.Tensor, kept: int) -> tuple[int, int]:
    """Return the bucket that holds the ``kept``-th largest value, and how many values lie above that bucket."""
    above = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(above, kept))
    bucket = histogram.numel() - 1 - position
    return bucket, int(above[position] - histogram[bucket])
