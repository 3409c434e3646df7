"""The largest inputs of linear layers over the calibration samples, channel by channel, with one block in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from typing import Any

import torch

from compress.architectures.model_map import model_map
from compress.blockwise.block import BlockView
from compress.blockwise.executor import BlockExecutor
from compress.blockwise.experts import unfused
from compress.blockwise.inputs import Inputs
from compress.blockwise.linears import TargetLinear, find_linears
from compress.blockwise.self_check import check_blockwise
from compress.blockwise.unchanged import unchanged_blocks
from compress.checkpoint.values import Checkpoint
from compress.errors import PassError
from compress.passes.base import Context


def largest_inputs(
    checkpoint: Checkpoint,
    names: Collection[str],
    context: Context,
    folder: str,
    visit: Callable[[TargetLinear], None] = lambda linear: None,
) -> dict[str, torch.Tensor]:
    """Largest magnitudes of the inputs of each layer, float32 [I], by tensor. Masked tokens do not count, but in experts.

    Args:
        names: tensors of linear layers. folder: of the hidden states, in the workspace. visit: called with each loaded layer.

    Raises:
        PassError: the model cannot be run block by block, or a layer is outside its blocks.
    """
    batches, processes = context.data("calibration"), context.workspace.processes
    executor = BlockExecutor(
        checkpoint,
        Inputs(batches.values, batches.mask, batches.target_mask),
        dtype=context.dtype,
        device=context.device,
        seed=context.seed,
        processes=processes,
    )
    check_blockwise(executor, context.progress)
    mapped, wanted = model_map(checkpoint.spec), dict[int, set[str]]()
    for name in names:
        if (index := mapped.block_of(name)) is None:
            raise PassError(
                f"{name} is outside the blocks, where inputs are not measured",
                key="activations",
                fix="leave it out of `overrides`, or use a format with dynamic scales",
            )
        wanted.setdefault(index, set()).add(name)
    largest = {name: torch.zeros(mapped.linears[name].I) for name in names}
    with context.progress.task("measuring inputs", executor.depth, "blocks") as task, ExitStack() as fused:
        for block in unchanged_blocks(executor, context.workspace.folder(folder).path, executor.depth - 1, {}):
            fused.close()
            linears, swaps = find_linears(executor.streamed, block.index, block.module, wanted.get(block.index, ()))
            fused.enter_context(unfused(swaps))  # until the block has run, next
            for linear in linears:
                visit(linear)
                linear.module.register_forward_pre_hook(_observer(linear, executor, largest))
            task.advance(note=f"block {block.index}")
    if processes.world > 1 and largest:
        flat = torch.zeros(processes.world, sum(map(len, largest.values())))
        flat[processes.rank] = torch.cat(list(largest.values()))
        processes.all_reduce(flat)
        parts = torch.split(flat.amax(0), [len(values) for values in largest.values()])
        largest = dict(zip(largest, parts, strict=True))
    return largest


def _observer(
    linear: TargetLinear, view: BlockView, largest: dict[str, torch.Tensor]
) -> Callable[[Any, tuple[Any, ...]], None]:
    """A hook that records the largest inputs of a layer, a batch at a time in the order of the view's batches."""
    batches: Iterator[list[int]] = view.batches()

    def hook(module: Any, args: tuple[Any, ...]) -> None:
        sizes = args[0].abs()
        rows = next(batches, None) if linear.owner is None else None
        mask = None if rows is None else view.token_mask(rows)
        if mask is not None and mask.shape == sizes.shape[:2]:
            sizes = sizes * mask[..., None]
        if sizes.numel():
            now = sizes.flatten(0, -2).amax(0).float().cpu()
            largest[linear.tensor] = torch.maximum(largest[linear.tensor], now)

    return hook
