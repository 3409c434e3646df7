"""Solving for the matrices of one block, group by group; of several processes each solves some matrices for all."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from compress.blockwise.asymmetric import InputMismatch
from compress.blockwise.block import Block
from compress.blockwise.hessians import InputStatistics
from compress.blockwise.linears import TargetLinear

S = TypeVar("S")
#: A group of linears, its statistics, its mismatch, and whether the block may be changed.
GroupInputs = tuple[list[TargetLinear], InputStatistics, InputMismatch | None, bool]


class MatrixSolver(Protocol[S]):
    """Finds a solution of type ``S`` for each matrix of a block."""

    def prepare(
        self,
        linears: Sequence[TargetLinear],
        statistics: InputStatistics,
        mismatch: InputMismatch | None,
        shared: dict[str, Any],
    ) -> None:
        """Compute for matrices with the same inputs what is computed faster for all at once; may leave ``shared`` empty.

        Args:
            linears: those that `solve` gets next, one by one, with the same ``shared``.
        """
        return None

    def solve(
        self,
        linear: TargetLinear,
        statistics: InputStatistics,
        mismatch: InputMismatch | None,
        shared: dict[str, Any],
    ) -> tuple[S, dict[str, Any]]:
        """The solution for a matrix, and its row for the report. Changes nothing.

        Args:
            shared: as `prepare` left it for the first matrix of a group; keeps what matrices with the same inputs share.
        """
        ...

    def blank(self, linear: TargetLinear) -> S:
        """A solution of the right shapes and dtypes, for processes that receive another one's solution."""
        ...

    def tensors(self, solution: S) -> Sequence[torch.Tensor]:
        """The tensors that a solution consists of, contiguous, always in the same order."""
        ...

    def place(self, linear: TargetLinear, solution: S) -> None:
        """Write a solution's weights into the block."""
        ...


def solve_block(block: Block, groups: Iterable[GroupInputs], solver: MatrixSolver[S]) -> dict[str, S]:
    """Solve for each linear, by name. ``block.details["tensors"]`` gets the rows, with seconds.

    Processes solve at the same time: each has some matrices of every group, shared out by cost (`shared_out`). They exchange
    solutions when the block may be changed, and at the end.

    Args:
        groups: as they are measured; each group is solved before the next one is asked for, and placed as soon as the block may
            be changed.
    """
    processes = block.view.processes
    solutions: dict[str, S] = {}
    report: dict[str, Any] = {}
    waiting: list[tuple[TargetLinear, int]] = []
    loads = [0.0] * processes.world

    def exchange() -> None:
        for linear, worker in waiting:
            if worker != processes.rank:
                solutions[linear.name] = solver.blank(linear)
            processes.broadcast(worker, *solver.tensors(solutions[linear.name]))
            report[linear.name] = processes.broadcast_object(worker, report.get(linear.name))

    for group, statistics, mismatch, free in groups:
        shared: dict[str, Any] = {}
        workers = shared_out([linear.weight.shape[0] * linear.weight.shape[1] ** 2 for linear in group], loads)
        own = [linear for linear, worker in zip(group, workers, strict=True) if worker == processes.rank]
        start = time.perf_counter()
        solver.prepare(own, statistics, mismatch, shared)
        prepared = (time.perf_counter() - start) / max(1, len(own))
        for linear in own:
            start = time.perf_counter()
            solutions[linear.name], row = solver.solve(linear, statistics, mismatch, shared)
            report[linear.name] = row | {"seconds": round(prepared + time.perf_counter() - start, 3)}
        waiting += zip(group, workers, strict=True)
        if free:
            exchange()
            for linear, _ in waiting:
                solver.place(linear, solutions[linear.name])
            waiting.clear()
            loads = [0.0] * processes.world
    exchange()
    block.details["tensors"] = report
    return solutions


def shared_out(costs: Sequence[float], loads: list[float]) -> list[int]:
    """The worker of each item: the dearest first, each to the worker with the least load; ``loads`` grows by the costs."""
    workers = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        workers[item] = min(range(len(loads)), key=loads.__getitem__)
        loads[workers[item]] += costs[item]
    return workers
