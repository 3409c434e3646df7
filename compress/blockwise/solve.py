"""Solving for the matrices of one block, group by group; of several processes each solves some groups for all."""

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

    def solve(
        self,
        linear: TargetLinear,
        statistics: InputStatistics,
        mismatch: InputMismatch | None,
        shared: dict[str, Any],
    ) -> tuple[S, dict[str, Any]]:
        """The solution for a matrix, and its row for the report. Changes nothing.

        Args:
            shared: empty for the first matrix of a group; keeps what matrices with the same inputs share.
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

    Args:
        groups: as they are measured; each group is solved before the next one is asked for, and placed as soon as the block may
            be changed.
    """
    processes = block.view.processes
    solutions: dict[str, S] = {}
    report: dict[str, Any] = {}
    waiting: list[TargetLinear] = []
    for number, (group, statistics, mismatch, free) in enumerate(groups):
        worker = number % processes.world
        shared: dict[str, Any] = {}
        for linear in group:
            start = time.perf_counter()
            if worker == processes.rank:
                solution, row = solver.solve(linear, statistics, mismatch, shared)
                row["seconds"] = round(time.perf_counter() - start, 3)
            else:
                solution, row = solver.blank(linear), {}
            processes.broadcast(worker, *solver.tensors(solution))
            report[linear.name] = processes.broadcast_object(worker, row)
            solutions[linear.name] = solution
            waiting.append(linear)
        if free:
            for linear in waiting:
                solver.place(linear, solutions[linear.name])
            waiting.clear()
    block.details["tensors"] = report
    return solutions
