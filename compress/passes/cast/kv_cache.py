"""Static scales of a quantised cache: the largest key and value of every block over the calibration samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from compress.architectures.model_map import model_map
from compress.blockwise.block import BlockView
from compress.blockwise.executor import BlockExecutor
from compress.blockwise.inputs import Inputs
from compress.blockwise.self_check import check_blockwise
from compress.blockwise.unchanged import unchanged_blocks
from compress.checkpoint.running import input_formats
from compress.checkpoint.values import Checkpoint
from compress.distributed import ProcessGroup
from compress.errors import PassError
from compress.models.emulation import cached_attentions, round_inputs, tap_cache
from compress.passes.base import Context
from compress.progress import Progress
from compress.spec.spec import Spec
from compress.workspace import Workspace

#: Largest E4M3 code.
_LARGEST = 448.0


def cache_scales(checkpoint: Checkpoint, spec: Spec, context: Context) -> dict[str, torch.Tensor]:
    """Static scales of the cache of a cast checkpoint, by tensor name; magnitudes are kept in the workspace."""
    from compress.blockwise.inputs import Inputs
    from compress.passes.cast.kv_cache import largest_cached, to_scales

    batches = context.data("calibration")
    magnitudes = context.workspace.cached(
        "cache",
        lambda: largest_cached(
            checkpoint,
            Inputs(batches.values, batches.mask, batches.target_mask),
            workspace=context.workspace.folder("cache"),
            dtype=context.dtype,
            device=context.device,
            progress=context.progress,
            seed=context.seed,
        ),
    )
    by_head = spec.structure.kv_cache == "fp8-head"
    scales: dict[str, torch.Tensor] = {}
    for names, pair in zip(model_map(spec).cache_scales.values(), magnitudes, strict=True):
        scales |= {name: to_scales(largest, by_head=by_head) for name, largest in zip(names, pair, strict=True)}
    largest = [[max(x) for x in side] for side in zip(*magnitudes, strict=True)]
    context.details["cached keys and values"] = (
        f"{'a scale per head' if by_head else 'a scale per layer'}; largest magnitudes over the calibration data, by layer: "
        f"keys {min(largest[0]):.3g} to {max(largest[0]):.3g}, values {min(largest[1]):.3g} to {max(largest[1]):.3g}"
    )
    return scales


def largest_cached(
    checkpoint: Checkpoint,
    inputs: Inputs,
    *,
    workspace: Workspace,
    dtype: str,
    device: str,
    progress: Progress,
    seed: int,
) -> list[tuple[list[float], list[float]]]:
    """Largest magnitudes of keys and of values for each block, by head. Masked tokens do not count.

    Raises:
        PassError: the model cannot be run block by block, or a block caches no keys and values.
    """
    executor = BlockExecutor(checkpoint, inputs, dtype=dtype, device=device, seed=seed, processes=workspace.processes)
    mapped = model_map(checkpoint.spec)
    formats = {mapped.in_memory(module): f for module, f in input_formats(checkpoint.spec).items()}
    static = {
        mapped.in_memory(module): codes.static_inputs
        for module in input_formats(checkpoint.spec)
        if (codes := checkpoint.tensor(f"{module}.weight").codes) is not None and codes.static_inputs
    }
    round_inputs(executor.streamed.model, formats, static)
    check_blockwise(executor, progress)
    largest: list[tuple[list[float], list[float]]] = []
    with progress.task("measuring keys and values", executor.depth, "blocks") as task:
        for block in unchanged_blocks(executor, workspace.path, executor.depth - 1, {}):
            observer = _LargestObserver(executor)
            attentions = cached_attentions(block.module)
            if len(attentions) != 1:
                raise PassError(f"block {block.index} has {len(attentions)} attentions that cache keys and values")
            observer.tap(*attentions[0])
            largest.append(observer.of_all)  # filled when the block runs, next
            task.advance(note=f"block {block.index}")
    return [_together(pair, workspace.processes) for pair in largest]


class _LargestObserver:
    """Records the largest magnitudes of a block's keys and values, a batch at a time in the order of the view's batches."""

    def __init__(self, view: BlockView) -> None:
        self._view = view
        self._batches: Iterator[list[int]] = view.batches()
        self.of_all: tuple[list[float], list[float]] = ([], [])

    def tap(self, argument: str, attention: torch.nn.Module) -> None:
        tap_cache(argument, attention, self._note)

    def _note(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = self._view.token_mask(next(self._batches))
        for largest, tensor in zip(self.of_all, (key, value), strict=True):
            sizes = tensor.abs()
            if mask is not None:
                sizes = sizes * mask[:, None, :, None]
            now = sizes.float().amax((0, 2, 3)).tolist()
            largest[:] = map(max, largest or now, now)
        return key, value


def _together(
    pair: tuple[Sequence[float], Sequence[float]], processes: ProcessGroup
) -> tuple[list[float], list[float]]:
    """Maximum over all processes."""
    heads = processes.broadcast_object(0, len(pair[0]))
    result = []
    for side in pair:
        rows = torch.zeros(processes.world, heads)
        if side:
            rows[processes.rank] = torch.tensor(side)
        processes.all_reduce(rows)
        result.append(rows.amax(0).tolist())
    return result[0], result[1]


def to_scales(largest: Sequence[float], *, by_head: bool) -> torch.Tensor:
    """Scale [1], or scales per head [heads, 1, 1], that map the largest magnitude to the largest code; float32."""
    scale = torch.tensor(largest if by_head else [max(largest)]) / _LARGEST
    scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
    return scale[:, None, None] if by_head else scale
