"""Solving for the matrices of one block, group by group; of several processes each solves some groups for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from compress.blockwise.asymmetric import Drift
from compress.blockwise.linears import Site, Statistics
from compress.blockwise.runner import Block

A = TypeVar("A")
#: A group of sites, its statistics, its drift, and whether the block may be changed.
Measured = tuple[list[Site], Statistics, Drift | None, bool]
#: A site, the statistics and drift of its group, and what sites with the same inputs share ▶ what is found, and a row for the
#: report.
Solve = Callable[[Site, Statistics, Drift | None, dict[str, Any]], tuple[A, dict[str, Any]]]


def solve_block(
    block: Block,
    groups: Iterable[Measured],
    solve: Solve[A],
    *,
    blank: Callable[[Site], A],
    tensors: Callable[[A], Sequence[torch.Tensor]],
    place: Callable[[Site, A], object],
) -> dict[str, A]:
    """What is found for each site, by its name. ``block.details["tensors"]`` gets the rows, with seconds.

    Args:
        groups: as they are measured; each is solved for before the next is asked for.
        blank: what the processes that do not solve a site have of it, for ``tensors`` to be filled in.
        tensors: those that what was found consists of. place: puts it into the block, as soon as that may be changed.
    """
    ranks = block.sweep.ranks
    found: dict[str, A] = {}
    rows: dict[str, Any] = {}
    waiting: list[Site] = []
    for number, (group, statistics, drift, free) in enumerate(groups):
        solver = number % ranks.world
        shared: dict[str, Any] = {}
        for site in group:
            start = time.perf_counter()
            if solver == ranks.rank:
                made, row = solve(site, statistics, drift, shared)
                row["seconds"] = round(time.perf_counter() - start, 3)
            else:
                made, row = blank(site), {}
            ranks.spread(solver, *tensors(made))
            rows[site.name] = ranks.tell(solver, row)
            found[site.name] = made
            waiting.append(site)
        if free:
            for site in waiting:
                place(site, found[site.name])
            waiting.clear()
    block.details["tensors"] = rows
    return found
