"""The choice by measured divergence, and the logits of sinks, on calibration samples."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compress.architectures.conversions.windows import current_windows
from compress.checkpoint.edits.local_cache import HeadWindows
from compress.errors import PassError
from compress.passes.base import Context
from compress.passes.local_attention.choose import Windows, evenly, full_blocks, held, trained_length
from compress.passes.local_attention.long_range import Repeated, with_repeats
from compress.passes.local_attention.settings import LocalAttentionSettings

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.data.batches import Batches
    from compress.sensitivity.attention import Sight
    from compress.sensitivity.windows import WindowLosses


def samples(settings: LocalAttentionSettings, context: Context) -> Batches:
    """The calibration samples, with passages that come again."""
    return repeated(settings, context).batches


def repeated(settings: LocalAttentionSettings, context: Context) -> Repeated:
    """The calibration samples, and which of their tokens come again."""
    batches = context.data("calibration")
    return with_repeats(batches, settings.long_range, max(settings.window), context.seed)


def choose(checkpoint: Checkpoint, settings: LocalAttentionSettings, context: Context) -> Windows:
    """The windows, with the logits of sinks where they are learned. A resumed run measures nothing again.

    Args:
        context: its calibration data are read where `settings.measured`.

    Raises:
        PassError: losses cannot be measured in this model. DataError: no sample is longer than the window.
    """
    if not settings.measured:
        return evenly(checkpoint.spec, settings)
    import torch

    learned = settings.sinks == "learned"
    losses = window_losses(checkpoint, settings, context)
    window, before = settings.window[0], current_windows(checkpoint.spec)
    candidates = [i for i, w in enumerate(before) if w is None]
    if settings.choose == "every" or isinstance(settings.full, tuple):
        chosen = evenly(checkpoint.spec, settings)
    else:
        count = full_blocks(checkpoint.spec, settings)
        full = _full(losses, candidates, window, count, settings, checkpoint) if count else set()
        chosen = Windows(tuple(None if i in full else window for i in range(len(before))))
    local = [i for i in range(len(before)) if learned and chosen.windows[i] is not None]
    sinks = {i: torch.tensor(losses.logits[i][0]) for i in local}
    values = {i: torch.tensor(losses.values[i]) for i in local}
    return replace(chosen, sinks=sinks, values=values, losses=tuple(losses.joint.diagonal().tolist()))


def _full(
    losses: WindowLosses,
    candidates: list[int],
    window: int,
    count: int,
    settings: LocalAttentionSettings,
    checkpoint: Checkpoint,
) -> set[int]:
    """The blocks that stay full."""
    from compress.solvers.windows import choose

    length = trained_length(checkpoint.spec, settings) or 2 * window
    everything, some = held(None, length), held(window, length)
    joint = losses.of(candidates, 1)
    budget = count * everything + (len(candidates) - count) * some
    options = choose([[everything, some]] * len(candidates), joint, budget)
    assert options is not None
    return {block for block, option in zip(candidates, options, strict=True) if option == 0}


def window_losses(checkpoint: Checkpoint, settings: LocalAttentionSettings, context: Context) -> WindowLosses:
    """Expected losses of the settings' windows, in each block or KV group; cached in the workspace."""
    from compress.blockwise.executor import BlockExecutor
    from compress.blockwise.inputs import Inputs
    from compress.sensitivity.windows import WindowLosses, window_losses

    def compute() -> dict[str, object]:
        read = repeated(settings, context)
        batches = read.batches
        executor = BlockExecutor(
            checkpoint,
            Inputs(batches.values, batches.mask, batches.target_mask),
            dtype=context.dtype,
            device=context.device,
            seed=context.seed,
            processes=context.workspace.processes,
        )
        executor.learn_calls()
        return window_losses(
            executor,
            [_sight(settings, window) for window in settings.window],
            by=settings.by,
            weights=read.weights(settings.repeat_weight),
            workspace=context.workspace.folder("windows"),
            progress=context.progress,
        ).to_json()

    losses = WindowLosses.from_json(context.workspace.cached("window_losses", compute))
    if not bool(losses.joint.isfinite().all()):
        raise PassError("the losses of windows are not finite", fix="check the checkpoint's weights for NaN")
    return losses


def _sight(settings: LocalAttentionSettings, window: int) -> Sight:
    """The tokens that a local head sees."""
    from compress.sensitivity.attention import Sight

    first = 0 if settings.sinks == "learned" else settings.sinks
    if settings.pattern == "window":
        return Sight(window, first, logits=settings.sinks == "learned")
    more = {"stride": settings.stride or window, "keep": min(settings.keep, window), "pattern": settings.pattern}
    return Sight(window, first, HeadWindows({"window": window, "sinks": first, "full": (), "positions": 1, **more}))
