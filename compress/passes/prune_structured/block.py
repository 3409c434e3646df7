"""Narrowing one block of a sweep: which units stay, least squares on the survivors, then tuning of what is kept.

The block keeps its shape: removed units are zero, which is what a narrower block computes. Cutting them out comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from compress.architectures.groups import Merge, Units
from compress.blockwise.linears import Site, Statistics
from compress.blockwise.probe import on_trial
from compress.blockwise.reconstruct import Tuning, floats, tune
from compress.blockwise.runner import Block, Changed, Sweep
from compress.passes.prune_structured.kv_heads import merge_heads
from compress.solvers.obs import keep_by_loss, keep_by_score, least_squares

Score = Literal["loss", "activation", "taylor", "magnitude"]


@dataclass(frozen=True)
class Narrowing:
    """How to narrow blocks.

    Attributes:
        units: block ▶ units and how many of them go, those that come first in the block first.
        merges: block ▶ key and value heads to merge, before anything else.
        score: which go. repair: whether survivors make up for them by least squares. tuning: of each block afterwards.
        scores: of `taylor`, importance of each unit by the name of the module that reads it.
    """

    units: Mapping[int, Sequence[tuple[Units, int]]]
    merges: Mapping[int, Merge]
    score: Score
    repair: bool
    tuning: Tuning | None
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)


def narrow_block(block: Block, how: Narrowing) -> dict[str, Changed]:
    """Zero units of a block in place, and repair it.

    ``block.details`` gets ``kept`` (reading module ▶ numbers of the units that stay), a row per matrix that reads units (how
    many stay, relative output error) and, where it was tuned, the block's error before and after.
    """
    sites = {site.name: site for site in block.sites}
    zeros: list[tuple[torch.Tensor, torch.Tensor]] = []  # a view, first axis first, and its rows that are zero
    kept: dict[str, list[int]] = {}
    rows: dict[str, Any] = {}
    projections: list[Callable[[], None]] = []
    if (merge := how.merges.get(block.index)) is not None:
        name = f"{merge.output.module}.weight"
        rows[name], again = merge_heads(block, merge, align=how.score != "magnitude", repair=how.repair)
        projections.append(again)
    todo = list(how.units.get(block.index, ()))
    while todo:
        kind = todo[0][0].kind  # all experts of a block at once; the MLP sees what narrower attention gives
        part = {f"{units.name}.weight": (units, remove) for units, remove in todo if units.kind == kind}
        todo = [(units, remove) for units, remove in todo if units.kind != kind]
        solved = []
        for group, statistics, _ in block.statistics(groups=block.reading(part)):
            site = next(site for site in group if site.name in part)
            units, remove = part[site.name]
            keep, weight, bias, row = _solve(block, site, sites, statistics, units, remove, how)
            kept[units.name], rows[site.name] = keep, row
            solved.append((site, units, keep, weight, bias))
        for site, units, keep, weight, bias in solved:
            site.weight.copy_(weight)
            if bias is not None:
                _bias(site).copy_(bias)
            zeros += _zeros(units, keep, sites)
        _clear(zeros)
    block.details |= {"kept": kept, "tensors": rows}
    if how.tuning is not None and how.tuning.epochs:
        masks = [(site.weight, ~mask) for site in block.sites if (mask := block.earlier_mask(site)) is not None]

        def project() -> None:
            _clear(zeros)
            for again in projections:
                again()
            for weight, gone in masks:
                weight.masked_fill_(gone, 0)

        block.details["tuning"] = tune(block, how.tuning, floats(block), project)
    return {}


def narrow_on_trial(
    sweep: Sweep, counts: Mapping[str, tuple[Units, Sequence[int]]], how: Narrowing
) -> Callable[[str], dict[str, torch.Tensor]]:
    """What removing units alone would change of the matrices that read them: ΔW by number of the trial, see `trials.on_trial`.

    Args:
        counts: by tensor name the units that it reads, and how many of them to remove, one number after another.
        how: the score, and whether survivors make up for them.
    """

    def measure(block: Block) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        sites = {site.name: site for site in block.sites}
        for group, statistics, _ in block.statistics():
            for site in group:
                (units, removed), changes = counts[site.name], {}
                for number, remove in enumerate(removed):
                    _, weight, _, _ = _solve(block, site, sites, statistics, units, remove, how)
                    changes[str(number)] = weight - site.weight
                yield site.name, changes

    return on_trial(sweep, "removing units on trial", measure)[0]


def _solve(
    block: Block,
    site: Site,
    sites: Mapping[str, Site],
    statistics: Statistics,
    units: Units,
    remove: int,
    how: Narrowing,
) -> tuple[list[int], torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """Units that stay, new weights [O, I] and bias [O] of the module that reads them, and what is worth saying."""
    ranks, cold = block.sweep.ranks, statistics.tokens == 0
    bias = None if site.owner is not None or site.module.bias is None else _bias(site)
    hessian = statistics.hessian if bias is None else statistics.centred()
    if how.score == "magnitude" or cold:
        keep = keep_by_score(magnitude(units, {n: s.weight for n, s in sites.items()}), remove, runs=units.groups)
    elif how.score == "taylor":
        keep = keep_by_score(torch.tensor(how.scores[units.name]), remove, runs=units.groups)
    elif how.score == "activation":
        power = statistics.hessian.diagonal().view(units.count, -1).sum(1).sqrt()
        keep = keep_by_score(power.cpu(), remove, runs=units.groups)
    else:
        keep = keep_by_loss(site.weight, hessian, remove, width=units.width, runs=units.groups)
    keep = ranks.tell(0, keep)
    stay = torch.tensor(units.members[-1].entries(units.count, keep), device=site.weight.device)
    weight = torch.zeros_like(site.weight, memory_format=torch.contiguous_format)
    weight[:, stay] = site.weight[:, stay]
    if how.repair and not cold:
        weight[:, stay] = least_squares(site.weight, hessian, stay).to(weight.dtype)
        if (mask := block.earlier_mask(site)) is not None:
            weight.masked_fill_(~mask, 0)
    ranks.spread(0, weight)
    if how.repair and not cold and bias is not None:
        bias = bias + (site.weight - weight) @ (statistics.total / statistics.tokens).to(weight.dtype)
    error = statistics.relative_error(site.weight, weight, centred=how.repair and bias is not None)
    row: dict[str, Any] = {"kept": len(keep), "of": units.count, "error": error}
    if cold:
        row["note"] = "no token reached it: chosen by magnitude"
    return keep, weight, bias, row


def magnitude(units: Units, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Root of the sum of squares of each unit's weights, [units]; ``weights`` by tensor name, each [O, I]."""
    total = torch.zeros(units.count, dtype=torch.float64)
    for member in units.members:
        weight = weights[f"{member.module}.weight"]
        squares = weight.double().square().sum(1 if member.side == "out" else 0).cpu()
        entries = torch.tensor(member.entries(units.count, range(units.count)))
        by_unit = squares[entries].view(member.sections, units.count, member.width)
        total += by_unit.sum((0, 2))
    return total.sqrt()


def _bias(site: Site) -> torch.Tensor:
    module: Any = site.module
    bias: torch.Tensor = module.bias.data
    return bias


def _zeros(units: Units, keep: Sequence[int], sites: Mapping[str, Site]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    result = []
    for member in units.members:
        site = sites[f"{member.module}.weight"]
        gone = sorted(set(member.span(units.count)) - set(member.entries(units.count, keep)))
        index = torch.tensor(gone, device=site.weight.device, dtype=torch.long)
        result.append((site.weight if member.side == "out" else site.weight.T, index))
        if member.side == "out" and site.owner is None and site.module.bias is not None:
            result.append((_bias(site), index))
    return result


def _clear(zeros: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for view, rows in zeros:
        view[rows] = 0
