"""Sizes that bound the memory of a sweep; the plan reckons with the same ones. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

#: Tokens of one forward pass through a block; on a CPU few enough for its caches.
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 8192}
#: Bytes that freed tensors may leave with the process, to be used again.
ALLOCATOR_RETAIN = 128 << 20
#: Input widths up to which statistics are summed in float64; wider ones in float32.
FLOAT64_MAX_WIDTH = 2048
#: Bytes of statistics gathered at a time, if one group's alone are not more.
STATISTICS_BYTES = 1 << 30
#: Tokens that tell which errors at the outputs of matrices matter; a quarter of these gains four fifths as much.
GRADIENT_TOKENS = 32768
#: Bytes of curvatures by outputs that are held of one block; the matrices with most outputs gain least by them.
CURVATURE_BYTES = 512 << 20
#: Tokens whose logits are computed at a time.
LOGITS_PER_CHUNK = 256


def curvatures_that_fit(outputs: Iterable[int]) -> list[int]:
    """Of matrices with so many outputs those of which curvatures are held: from the narrowest on, within `CURVATURE_BYTES`."""
    ascending = sorted(outputs)
    return [
        o
        for o, used in zip(ascending, accumulate(4 * o * o for o in ascending), strict=True)
        if used <= CURVATURE_BYTES
    ]
