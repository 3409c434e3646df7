"""Solving for the matrices of one block, group by group; of several processes each solves some groups for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from compress.blockwise.asymmetric import InputMismatch
from compress.blockwise.linears import InputStatistics, TargetLinear
from compress.blockwise.runner import Block

A = TypeVar("A")
#: A group of sites, its statistics, its drift, and whether the block may be changed.
GroupInputs = tuple[list[TargetLinear], InputStatistics, InputMismatch | None, bool]
#: A site, the statistics and drift of its group, and what sites with the same inputs share ▶ what is found, and a row for the
#: report.
Solve = Callable[[TargetLinear, InputStatistics, InputMismatch | None, dict[str, Any]], tuple[A, dict[str, Any]]]


def solve_block(
    block: Block,
    groups: Iterable[GroupInputs],
    solve: Solve[A],
    *,
    blank: Callable[[TargetLinear], A],
    tensors: Callable[[A], Sequence[torch.Tensor]],
    place: Callable[[TargetLinear, A], object],
) -> dict[str, A]:
    """What is found for each site, by its name. ``block.details["tensors"]`` gets the rows, with seconds.

    Args:
        groups: as they are measured; each is solved for before the next is asked for.
        blank: what the processes that do not solve a site have of it, for ``tensors`` to be filled in.
        tensors: those that what was found consists of. place: puts it into the block, as soon as that may be changed.
    """
    processes = block.runner.processes
    found: dict[str, A] = {}
    rows: dict[str, Any] = {}
    waiting: list[TargetLinear] = []
    for number, (group, statistics, mismatch, free) in enumerate(groups):
        solver = number % processes.world
        shared: dict[str, Any] = {}
        for linear in group:
            start = time.perf_counter()
            if solver == processes.rank:
                made, row = solve(linear, statistics, mismatch, shared)
                row["seconds"] = round(time.perf_counter() - start, 3)
            else:
                made, row = blank(linear), {}
            processes.broadcast(solver, *tensors(made))
            rows[linear.name] = processes.broadcast_object(solver, row)
            found[linear.name] = made
            waiting.append(linear)
        if free:
            for linear in waiting:
                place(linear, found[linear.name])
            waiting.clear()
    block.details["tensors"] = rows
    return found
