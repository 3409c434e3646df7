"""Static scales of quantised inputs: the largest input of every layer over the calibration samples."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
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
from compress.checkpoint.values import Checkpoint, torch_dtype
from compress.errors import PassError
from compress.passes.base import Context
from compress.spec.formats import QuantFormat
from compress.spec.spec import Spec

#: Largest codes of E4M3, and of E2M1 times those of its scales.
_E4M3, _E2M1 = 448.0, 6.0 * 448.0


def input_scales(checkpoint: Checkpoint, spec: Spec, context: Context) -> dict[str, dict[str, torch.Tensor]]:
    """Static input scales of a cast checkpoint, by tensor and name suffix; magnitudes are kept in the workspace.

    Args:
        checkpoint: with the cast weights, and without static scales. spec: the planned one.

    Raises:
        PassError: the model cannot be run block by block, or a cast layer is outside its blocks.
    """
    formats = {t.name: t.quant_format for t in spec.stored() if t.quant_format is not None}
    static = {name: quant_format for name, quant_format in formats.items() if quant_format.static_inputs}
    magnitudes = context.workspace.cached("inputs", lambda: _largest_inputs(checkpoint, list(static), context))
    context.details["quantised inputs"] = (
        f"a static scale for each of {len(static)} layers; largest magnitudes over the calibration data: "
        f"{min(magnitudes.values()):.3g} to {max(magnitudes.values()):.3g}"
    )
    return {
        name: _scale(magnitudes[name], quant_format, torch_dtype(spec.tensors[name].dtype))
        for name, quant_format in static.items()
    }


def _scale(largest: float, quant_format: QuantFormat, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The scale [1] that maps the largest input to the largest code; of nvfp4 the one that scales are multiplied with."""
    if quant_format.activations == "nvfp4":
        return {"input_global_scale": torch.tensor([_E2M1 / largest if largest else 1.0])}
    return {"input_scale": torch.tensor([largest / _E4M3 if largest else 1.0]).to(dtype)}


def _largest_inputs(checkpoint: Checkpoint, names: list[str], context: Context) -> dict[str, float]:
    """Largest magnitude of the inputs of each layer. Masked tokens do not count, but in experts."""
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
    largest = dict.fromkeys(names, 0.0)
    with context.progress.task("measuring inputs", executor.depth, "blocks") as task, ExitStack() as fused:
        for block in unchanged_blocks(executor, context.workspace.folder("inputs").path, executor.depth - 1, {}):
            fused.close()
            linears, swaps = find_linears(executor.streamed, block.index, block.module, wanted.get(block.index, ()))
            fused.enter_context(unfused(swaps))  # until the block has run, next
            for linear in linears:
                linear.module.register_forward_pre_hook(_observer(linear, executor, largest))
            task.advance(note=f"block {block.index}")
    values = torch.zeros(processes.world, len(names))
    values[processes.rank] = torch.tensor([largest[name] for name in names])
    processes.all_reduce(values)
    return _of_unreached(dict(zip(names, values.amax(0).tolist(), strict=True)))


def _observer(
    linear: TargetLinear, view: BlockView, largest: dict[str, float]
) -> Callable[[Any, tuple[Any, ...]], None]:
    """A hook that records the largest input of a layer, a batch at a time in the order of the view's batches."""
    batches: Iterator[list[int]] = view.batches()

    def hook(module: Any, args: tuple[Any, ...]) -> None:
        sizes = args[0].abs()
        rows = next(batches, None) if linear.owner is None else None
        mask = None if rows is None else view.token_mask(rows)
        if mask is not None and mask.shape == sizes.shape[:2]:
            sizes = sizes * mask[..., None]
        if sizes.numel():
            largest[linear.tensor] = max(largest[linear.tensor], float(sizes.max()))

    return hook


def _of_unreached(largest: Mapping[str, float]) -> dict[str, float]:
    """The same, with the largest of the other experts for those that no token reached."""
    alike: dict[str, float] = {}
    for name, value in largest.items():
        alike[_any_expert(name)] = max(alike.get(_any_expert(name), 0.0), value)
    return {name: value or alike[_any_expert(name)] for name, value in largest.items()}


def _any_expert(name: str) -> str:
    """A name without its last number, which is that of an expert where it has one."""
    return re.sub(r"\.\d+\.(?!.*\.\d+\.)", ".*.", name)
