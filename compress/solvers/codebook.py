"""Codebooks: 2**bits values per tensor by weighted k-means on the line, and the nearest value of each weight.

Letters: I inputs, N values on the line with their weights, K values of a codebook.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from compress.checkpoint.values import Codes

Array: TypeAlias = npt.NDArray[Any]
#: Low bits of a float32 that the histogram ignores. Each value of a 16-bit float has a bin of its own.
_DROPPED = 13
#: Least bins for each value of the codebook; with fewer, every distinct value of the tensor gets a bin.
_BINS_PER_VALUE = 4
#: Values that are clustered exactly; more are merged first. At 8 bits 1024 have up to .5 % more error, 4096 .1 % less.
_MERGED = 2048
#: Most rounds of Lloyd's algorithm; a few suffice after the exact clustering.
_ROUNDS = 100
#: Weights processed at a time.
_AT_ONCE = 1 << 21


def codebook(
    W: torch.Tensor, bits: int, importance_I: torch.Tensor | None = None, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the codebook of least Σ h_i (w - c(w))², where c(w) is the value nearest to w: weighted k-means on the line.

    Dynamic programming clusters a histogram of 2048 values exactly. Lloyd's algorithm then runs on a histogram whose bins
    separate all 16-bit floats. A tensor of at most 2**bits distinct values gets exactly these. The work is in float64 on the
    CPU, so the result does not depend on the machine.

    Args:
        W: weights, [..., in], any float dtype, finite.
        bits: 2 to 8.
        importance_I: h [in], such as the diagonal of Σ x xᵀ; None for equal weights.
        keep: keep-mask, bool, of W's shape; removed weights do not count.

    Returns:
        float64 [2**bits] on the CPU, ascending; the largest is repeated if fewer are needed.

    Source: weight sharing of Deep Compression (arXiv 1510.00149), weighted as in SqueezeLLM (arXiv 2306.07629); exact
    clustering as in Ckmeans.1d.dp (Wang and Song, 2011). Deep Compression starts Lloyd's algorithm from values at equal
    distances: after 300 rounds that had 1 and 24 % more error at 4 bits and 3 and 5 times the error at 8 bits, on two matrices
    of tiny-lm.
    """
    K = 1 << bits
    x_N, weight_N = _histogram(W, importance_I, keep)
    if len(x_N) < _BINS_PER_VALUE * K:
        x_N, weight_N = _distinct(W, importance_I, keep)
    if len(x_N) > K:
        merged = _merged(x_N, weight_N, _MERGED) if len(x_N) > _MERGED else (x_N, weight_N)
        x_N = _lloyd(x_N, weight_N, _exact(*merged, K))
    last = x_N[-1:] if len(x_N) else np.zeros(1)
    return torch.from_numpy(np.concatenate([x_N, last.repeat(K - len(x_N))]))


def to_codes(W: torch.Tensor, book_K: torch.Tensor, keep: torch.Tensor | None = None) -> Codes:
    """Return the indices of the nearest values of a codebook, int8 as files store them; 0 for removed weights.

    Args:
        W: weights of any shape and float dtype.
        book_K: the codebook, ascending, in the dtype in which it is stored.
        keep: keep-mask of W's shape.
    """
    half = len(book_K) // 2
    borders = borders_of(book_K.to(W.device))
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    flat = W.reshape(-1)
    for part, into in zip(torch.split(flat, _AT_ONCE), torch.split(codes.view(-1), _AT_ONCE), strict=True):
        into.copy_(torch.bucketize(part.to(borders.dtype), borders, out_int32=True) - half)
    return Codes(codes if keep is None else codes.masked_fill_(~keep, 0), book_K.to(W.device))


def borders_of(book_K: torch.Tensor) -> torch.Tensor:
    """Return the midpoints between neighbours, [K - 1], float32 or float64; a weight above one is nearer to the upper value."""
    book_K = book_K.to(torch.promote_types(book_K.dtype, torch.float32))
    return book_K[:-1] + (book_K[1:] - book_K[:-1]) / 2


def rounded(
    W: torch.Tensor,
    bits: int,
    dtype: torch.dtype,
    importance_I: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> Codes:
    """Return the codes of weights [..., in] without compensation: `codebook` rounded to ``dtype``, then `to_codes`."""
    return to_codes(W, codebook(W, bits, importance_I, keep).to(dtype), keep)


def _histogram(W: torch.Tensor, importance_I: torch.Tensor | None, keep: torch.Tensor | None) -> tuple[Array, Array]:
    """Return the mean and the weight of the values in each bin that is not empty, ascending, [N] each."""
    half = 1 << (31 - _DROPPED)
    weight_N, sum_N = torch.zeros(2, 2 * half, dtype=torch.float64)
    for x, h in _parts(W, importance_I, keep):
        bins = (x.float().view(torch.int32) >> _DROPPED) + half
        weight_N.index_add_(0, bins, torch.ones((), dtype=x.dtype).expand(x.shape) if h is None else h)
        sum_N.index_add_(0, bins, x if h is None else x * h)
    weight_N, sum_N = (torch.cat([t[:half].flip(0), t[half:]]) for t in (weight_N, sum_N))  # of negative floats
    some = weight_N > 0
    return (sum_N[some] / weight_N[some]).numpy(), weight_N[some].numpy()


def _distinct(W: torch.Tensor, importance_I: torch.Tensor | None, keep: torch.Tensor | None) -> tuple[Array, Array]:
    """Return the distinct values of the tensor, ascending, and the weight of each, [N] each."""
    parts = list(_parts(W, importance_I, keep))
    x_N, place = torch.unique(torch.cat([x for x, _ in parts]), return_inverse=True)
    h = None if importance_I is None else torch.cat([h for _, h in parts if h is not None])
    return x_N.numpy(), torch.bincount(place, h, len(x_N)).double().numpy()


def _parts(
    W: torch.Tensor, importance_I: torch.Tensor | None, keep: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield the kept values, some rows at a time, and their weights, None for 1; float64 [n] on the CPU."""
    width = max(1, W.shape[-1])
    h_I = None
    if importance_I is not None:
        h_I = importance_I.cpu().double()
        h_I = h_I / h_I.mean().clamp(min=1e-30) + 1e-6
    rows = max(1, _AT_ONCE // width)
    keeps = None if keep is None else torch.split(keep.reshape(-1, width), rows)
    for number, part in enumerate(torch.split(W.reshape(-1, width), rows)):
        x = part.cpu().double()
        h = None if h_I is None else h_I.expand(x.shape)
        if keeps is None:
            yield x.flatten(), None if h is None else h.flatten()
        else:
            among = keeps[number].cpu()
            yield x[among], None if h is None else h[among]


def _merged(x_N: Array, weight_N: Array, count: int) -> tuple[Array, Array]:
    """Return the mean and the weight of at most ``count`` runs of neighbouring values, narrow where values are dense.

    The density of runs is the cube root of that of the values, as in the best codebook of many values (Panter and Dite, 1951).
    """
    gap_N = np.diff(x_N, prepend=x_N[0], append=x_N[-1])
    share_N = np.cbrt(weight_N * ((gap_N[1:] + gap_N[:-1]) / 2) ** 2)
    for _ in range(16):  # a run holds at least one value: the excess share of an outlier is left to the others
        share_N = np.minimum(share_N, share_N.sum() / count)
    end_N = share_N.cumsum()
    run_N = np.minimum((end_N - share_N / 2) * (count / end_N[-1]), count - 1).astype(np.int64)
    first = np.flatnonzero(np.diff(run_N, prepend=-1))
    weight = np.add.reduceat(weight_N, first)
    return np.add.reduceat(weight_N * x_N, first) / weight, weight


class _Sums:
    """Prefix sums over runs of values i … j - 1."""

    def __init__(self, x_N: Array, weight_N: Array) -> None:
        self.weight = np.concatenate([[0.0], weight_N.cumsum()])
        self.moment = np.concatenate([[0.0], (weight_N * x_N).cumsum()])

    def gain(self, i: Array, j: Array) -> Array:
        """Return (Σ h x)² / Σ h, by which a run's squared error around its mean is below Σ h x²; 0 for an empty run."""
        weight = self.weight[j] - self.weight[i]
        result: Array = (self.moment[j] - self.moment[i]) ** 2 / np.where(weight > 0, weight, np.inf)
        return result

    def mean(self, i: Array, j: Array) -> Array:
        """Return the means of runs, none of them empty."""
        result: Array = (self.moment[j] - self.moment[i]) / (self.weight[j] - self.weight[i])
        return result


def _exact(x_N: Array, weight_N: Array, K: int) -> Array:
    """Return the means [K] of the K runs of least squared error.

    The best last run of the first j values begins no earlier as j grows. So rows j are solved from coarse to fine, each
    between the starts of its neighbours, and all rows of one level at once: O(K N log N).
    """
    N = len(x_N)
    sums = _Sums(x_N, weight_N)
    top = 1 << N.bit_length()  # more than N
    best_N = sums.gain(np.zeros(N + 1, np.int64), np.arange(N + 1))
    begins = []
    for _ in range(K - 1):
        begin = np.full(top + 1, N)
        begin[0] = 0
        following_N = np.zeros(N + 1)
        step = top // 2
        while step:
            row_R = np.arange(step, N + 1, 2 * step)
            low_R = begin[row_R - step]
            count_R = np.minimum(begin[row_R + step], row_R) - low_R + 1
            first_R = count_R.cumsum() - count_R
            i = np.arange(count_R.sum()) - np.repeat(first_R - low_R, count_R)
            value = best_N[i] + sums.gain(i, np.repeat(row_R, count_R))
            most_R = np.maximum.reduceat(value, first_R)
            begin[row_R] = np.minimum.reduceat(np.where(value == np.repeat(most_R, count_R), i, N), first_R)
            following_N[row_R] = most_R
            step //= 2
        begins.append(begin)
        best_N = following_N
    cuts = [N]
    for begin in reversed(begins):
        cuts.append(begin[cuts[-1]])
    ends = np.array(cuts)
    return sums.mean(np.append(ends[1:], 0), ends)[::-1]


def _lloyd(x_N: Array, weight_N: Array, book_K: Array) -> Array:
    """Return the codebook [K] after Lloyd's algorithm: assign to the nearest value, take means, until nothing changes."""
    sums = _Sums(x_N, weight_N)
    before = None
    for _ in range(_ROUNDS):
        cuts = np.searchsorted(x_N, (book_K[1:] + book_K[:-1]) / 2, side="right")
        begin, end = np.append(0, cuts), np.append(cuts, len(x_N))
        if before is not None and np.array_equal(cuts, before):
            break
        before = cuts
        some = end > begin
        book_K = book_K.copy()
        book_K[some] = sums.mean(begin[some], end[some])
    return book_K
