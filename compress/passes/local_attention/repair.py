"""Repair of a model with windows: its sinks by the original's predictions, its blocks by the outputs of the original's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.passes.base import Context
from compress.passes.blockwise import open_runner
from compress.passes.local_attention.choose import Windows
from compress.passes.local_attention.divergence import samples
from compress.passes.local_attention.refine import refined
from compress.passes.local_attention.settings import LocalAttentionSettings
from compress.passes.local_attention.stock import with_windows

if TYPE_CHECKING:
    from compress.blockwise.block import Block
    from compress.blockwise.reconstruct import TrainableTensor
    from compress.checkpoint.values import Checkpoint


def repaired(
    original: Checkpoint, changed: Checkpoint, chosen: Windows, settings: LocalAttentionSettings, context: Context
) -> Checkpoint:
    """The changed checkpoint with sinks refined and blocks tuned, as far as the settings ask for it."""
    if settings.sink_steps:
        chosen = refined(original, changed, chosen, settings, context)
        changed = with_windows(original, settings, chosen)
    return _tuned(original, changed, chosen, settings, context) if settings.tune_epochs else changed


def _tuned(
    original: Checkpoint, changed: Checkpoint, chosen: Windows, settings: LocalAttentionSettings, context: Context
) -> Checkpoint:
    """The changed checkpoint with all blocks tuned from the first one with a window, sinks included.

    Full blocks behind it are tuned too: they make up for what reaches them changed.
    """
    from compress.blockwise.reconstruct import Reconstruction, reconstruct_block
    from compress.blockwise.targets import Teacher
    from compress.checkpoint.values import Derived

    mapped = model_map(changed.spec)
    first = next(i for i, window in enumerate(chosen.windows) if window is not None)
    names = {x.name for block in mapped.blocks[first:] for x in block.linears if x.shared_with is None}
    batches = samples(settings, context)
    runner = open_runner(
        changed,
        names,
        replace(context, data=lambda name: batches),
        workspace=context.workspace.folder("tune"),
        with_targets=True,
        teacher=Teacher(original, range(1, mapped.depth + 1)),
    )
    options = Reconstruction(epochs=settings.tune_epochs)

    def tune(block: Block) -> dict[str, Any]:
        block.details["reconstruction"] = reconstruct_block(block, options, _trainable(block), lambda: None)
        return {}

    result = runner.run(tune, "tuning blocks")
    context.details["blocks"] = result.details
    return Derived(changed, changed.spec, result.reader())


def _trainable(block: Block) -> list[TrainableTensor]:
    """The block's floats; logits of sinks move by nats, whatever their size. One that is off gets no gradient and stays off."""
    from compress.blockwise.reconstruct import TrainableTensor, trainable_floats

    sinks = {id(p) for name, p in block.module.named_parameters() if name.endswith("sinks")}
    logits = [TrainableTensor(p, 1.0) for p in block.module.parameters() if id(p) in sinks]
    return trainable_floats(block, without=sinks) + logits
