"""Sizes that bound the memory and work of a run over the blocks; the plan uses the same ones. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

#: Tokens of one forward pass through a block; on a CPU few enough for its caches.
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 8192}
#: Bytes of freed tensors that the allocator may retain for reuse.
ALLOCATOR_RETAIN = 128 << 20
#: Largest input width at which statistics are summed in float64; wider ones are summed in float32.
FLOAT64_MAX_WIDTH = 2048
#: Bytes of statistics to collect in one pass; one group's statistics may exceed it.
STATISTICS_BYTES = 1 << 30
#: Tokens that output curvatures are measured on; a quarter of these gains four fifths as much.
GRADIENT_TOKENS = 32768
#: Bytes of output curvatures to hold for one block; the matrices with most outputs gain least from them.
CURVATURE_BYTES = 512 << 20
#: Bytes of changes on trial that are measured in one pass of the samples; one group's changes may exceed it.
PROBE_BYTES = 512 << 20
#: Tokens that divergences of changes on trial are measured on.
PROBE_TOKENS = 8192
#: Share of the samples that block reconstruction holds out to see whether the error falls; at least one.
HELD_OUT = 1 / 16
#: Samples of a step of block reconstruction, where weights and where scales of codes are trained.
SAMPLES_PER_STEP = {"floats": 4, "scales": 2}
#: Bytes of hidden states that trials without some blocks hold in memory at a time; those of one trial may exceed it.
STATES_BYTES = 128 << 20
#: Bytes of activations that a backward pass keeps in memory; more of them wait in a file.
SAVED_BYTES = 128 << 20
#: Tokens whose logits are computed at a time.
LOGITS_PER_CHUNK = 256
#: Most samples that a trial without some blocks runs on, and most contiguous groups of blocks that are tried.
TRIAL_SAMPLES, TRIAL_GROUPS = 32, 8


def most_trials(depth: int, count: int, groups: bool) -> int:
    """Number of sets of blocks that are tried at most to choose ``count``; with ``groups`` also contiguous ones."""
    greedy = sum(depth - i for i in range(count))
    return greedy + (min(TRIAL_GROUPS, depth - count + 1) if groups and count > 1 else 0)


def curvatures_that_fit(outputs: Iterable[int]) -> list[int]:
    """Output sizes whose curvature matrices fit `CURVATURE_BYTES`, smallest first."""
    ascending = sorted(outputs)
    return [
        o
        for o, used in zip(ascending, accumulate(4 * o * o for o in ascending), strict=True)
        if used <= CURVATURE_BYTES
    ]
