"""Prune the width of one block: choose units, solve the remaining weights by least squares, then reconstruct the block.

The block keeps its shape: removed units are zero, which computes the same as a narrower block. Slicing comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from compress.architectures.groups import KVHeadMerge, PrunableGroup
from compress.blockwise.block import Block
from compress.blockwise.hessians import InputStatistics
from compress.blockwise.linears import TargetLinear
from compress.blockwise.probe import ProbeFn
from compress.blockwise.reconstruct import Reconstruction, reconstruct_block, trainable_floats
from compress.blockwise.results import TensorExtras
from compress.passes.prune_structured.gaps import fill_gap
from compress.passes.prune_structured.kv_heads import merge_heads
from compress.solvers.obs import keep_by_score, least_squares, obs_prune_groups

UnitScore = Literal["obs", "activation", "taylor", "magnitude"]


@dataclass(frozen=True)
class WidthOptions:
    """How to prune the width of blocks.

    Attributes:
        units: by block, groups of units and how many of each to remove, in the order of the block's computation.
        merges: by block, KV heads to merge before anything else.
        importance: score of the units.
        compensate: solve the remaining weights by least squares.
        reconstruction: reconstruction of each block afterwards; None for none.
        scores: for `taylor`, importance of each unit by the name of the module that reads it.
        gaps: blocks after which others were removed, to compensate for by least squares.
    """

    units: Mapping[int, Sequence[tuple[PrunableGroup, int]]]
    merges: Mapping[int, KVHeadMerge]
    importance: UnitScore
    compensate: bool
    reconstruction: Reconstruction | None
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    gaps: Collection[int] = ()


def prune_block_width(block: Block, options: WidthOptions) -> dict[str, TensorExtras]:
    """Zero units of a block in place, and repair it.

    ``block.details`` gets ``kept`` (reading module ▶ indices of the kept units), a row for each matrix that reads units (number
    kept, relative output error) and, with reconstruction, the block's error before and after.
    """
    zeros, projections = _removed(block, options)
    if block.index in options.gaps and (filled := fill_gap(block)) is not None:
        block.details["gap"] = filled
    if options.reconstruction is not None and options.reconstruction.epochs:
        masks = [(linear.weight, ~mask) for linear in block.linears if (mask := block.earlier_mask(linear)) is not None]

        def project() -> None:
            _clear(zeros)
            for again in projections:
                again()
            for weight, gone in masks:
                weight.masked_fill_(gone, 0)

        block.details["tuning"] = reconstruct_block(block, options.reconstruction, trainable_floats(block), project)
    return {}


def _removed(
    block: Block, options: WidthOptions
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[Callable[[], None]]]:
    """Zero the units; nothing that this computes is in memory while the block trains.

    Returns:
        Views of weights with the indices of their rows that are zero now, and what restores the weights of merged heads.
    """
    linears = {linear.name: linear for linear in block.linears}
    zeros: list[tuple[torch.Tensor, torch.Tensor]] = []
    kept: dict[str, list[int]] = {}
    rows: dict[str, Any] = {}
    projections: list[Callable[[], None]] = []
    if (merge := options.merges.get(block.index)) is not None:
        name = f"{merge.output.module}.weight"
        rows[name], again = merge_heads(
            block, merge, align=options.importance != "magnitude", compensate=options.compensate
        )
        projections.append(again)
    todo = list(options.units.get(block.index, ()))
    while todo:
        kind = todo[0][0].kind  # all experts of a block at once; the MLP reads the output of the narrower attention
        part = {f"{units.name}.weight": (units, remove) for units, remove in todo if units.kind == kind}
        todo = [(units, remove) for units, remove in todo if units.kind != kind]
        solved = []
        for group, statistics, _ in block.statistics(groups=block.groups_with(part)):
            linear = next(linear for linear in group if linear.name in part)
            units, remove = part[linear.name]
            keep, weight, bias, row = _solve(block, linear, linears, statistics, units, remove, options)
            kept[units.name], rows[linear.name] = keep, row
            solved.append((linear, units, keep, weight, bias))
        for linear, units, keep, weight, bias in solved:
            linear.weight.copy_(weight)
            if bias is not None:
                _bias(linear).copy_(bias)
            zeros += _zeros(units, keep, linears)
        _clear(zeros)
    block.details |= {"kept": kept, "tensors": rows}
    return zeros, projections


def probe_widths(counts: Mapping[str, tuple[PrunableGroup, Sequence[int]]], options: WidthOptions) -> ProbeFn:
    """Change ΔW of each matrix of a block that reads removed units, by number of the probe.

    Args:
        counts: by tensor name, the units that it reads and the numbers of them to remove.
        options: score and compensation.
    """

    def measure(block: Block) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        linears = {linear.name: linear for linear in block.linears}
        for group, statistics, _ in block.statistics():
            for linear in group:
                (units, removed), changes = counts[linear.name], {}
                for number, remove in enumerate(removed):
                    _, weight, _, _ = _solve(block, linear, linears, statistics, units, remove, options)
                    changes[str(number)] = (weight - linear.weight).bfloat16()
                yield linear.name, changes

    return measure


def _solve(
    block: Block,
    linear: TargetLinear,
    linears: Mapping[str, TargetLinear],
    statistics: InputStatistics,
    units: PrunableGroup,
    remove: int,
    options: WidthOptions,
) -> tuple[list[int], torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """Kept units, new weights [O, I] and bias [O] of the module that reads them, and the row for the report."""
    processes, cold = block.view.processes, statistics.tokens == 0
    bias = None if linear.owner is not None or linear.module.bias is None else _bias(linear)
    hessian = statistics.hessian if bias is None else statistics.centred()
    if options.importance == "magnitude" or cold:
        keep = keep_by_score(magnitude(units, {n: s.weight for n, s in linears.items()}), remove, runs=units.groups)
    elif options.importance == "taylor":
        keep = keep_by_score(torch.tensor(options.scores[units.name]), remove, runs=units.groups)
    elif options.importance == "activation":
        power = statistics.hessian.diagonal().view(units.count, -1).sum(1).sqrt()
        keep = keep_by_score(power.cpu(), remove, runs=units.groups)
    else:
        keep = obs_prune_groups(linear.weight, hessian, remove, width=units.width, runs=units.groups)
    keep = processes.broadcast_object(0, keep)
    stay = torch.tensor(units.members[-1].entries(units.count, keep), device=linear.weight.device)
    weight = torch.zeros_like(linear.weight, memory_format=torch.contiguous_format)
    weight[:, stay] = linear.weight[:, stay]
    if options.compensate and not cold:
        weight[:, stay] = least_squares(linear.weight, hessian, stay).to(weight.dtype)
        if (mask := block.earlier_mask(linear)) is not None:
            weight.masked_fill_(~mask, 0)
    processes.broadcast(0, weight)
    if options.compensate and not cold and bias is not None:
        bias = bias + (linear.weight - weight) @ (statistics.total / statistics.tokens).to(weight.dtype)
    error = statistics.relative_error(linear.weight, weight, centred=options.compensate and bias is not None)
    row: dict[str, Any] = {"kept": len(keep), "of": units.count, "error": error}
    if cold:
        row["note"] = "no token reached it: chosen by magnitude"
    return keep, weight, bias, row


def magnitude(units: PrunableGroup, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Root of the sum of squares of each unit's weights, [units]; ``weights`` by tensor name, each [O, I]."""
    total = torch.zeros(units.count, dtype=torch.float64)
    for member in units.members:
        weight = weights[f"{member.module}.weight"]
        squares = weight.double().square().sum(1 if member.side == "out" else 0).cpu()
        entries = torch.tensor(member.entries(units.count, range(units.count)))
        by_unit = squares[entries].view(member.sections, units.count, member.width)
        total += by_unit.sum((0, 2))
    return total.sqrt()


def _bias(linear: TargetLinear) -> torch.Tensor:
    module: Any = linear.module
    bias: torch.Tensor = module.bias.data
    return bias


def _zeros(
    units: PrunableGroup, keep: Sequence[int], linears: Mapping[str, TargetLinear]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    result = []
    for member in units.members:
        linear = linears[f"{member.module}.weight"]
        gone = sorted(member.lost(units.count, keep))
        index = torch.tensor(gone, device=linear.weight.device, dtype=torch.long)
        result.append((linear.weight if member.side == "out" else linear.weight.T, index))
        if member.side == "out" and linear.owner is None and linear.module.bias is not None:
            result.append((_bias(linear), index))
    return result


def _clear(zeros: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for view, rows in zeros:
        view[rows] = 0
