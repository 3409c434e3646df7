"""Solving for the matrices of one block, group by group; of several processes each solves some matrices for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from compress.blockwise.asymmetric import Measured
from compress.blockwise.block import Block
from compress.blockwise.correction import InputMismatch
from compress.blockwise.hessians import InputStatistics
from compress.blockwise.linears import TargetLinear
from compress.blockwise.shares import Portion, shared_out
from compress.distributed import ProcessGroup

S = TypeVar("S")


class GroupToSolve(NamedTuple):
    """A group that `MatrixSolver.solve` gets next, matrix by matrix.

    Attributes:
        linears: those of this process. statistics, mismatch: of the group's inputs. shared: empty, for what `solve` gets.
    """

    linears: Sequence[TargetLinear]
    statistics: InputStatistics
    mismatch: InputMismatch | None
    shared: dict[str, Any]


class MatrixSolver(Protocol[S]):
    """Finds a solution of type ``S`` for each matrix of a block."""

    def independent_outputs(self, linear: TargetLinear) -> bool:
        """Whether each output of the matrix may be solved for without the others.

        Then `solve` may get a matrix of some outputs alone (``linear.outputs``), and its row gets ``energy``, Σ ||w x||² over
        its outputs and all tokens, by which errors are joined.
        """
        return False

    def groups_together(self, linears: Sequence[TargetLinear]) -> int:
        """The number of groups of experts of these shapes that `prepare` may get at once."""
        return 1

    def prepare(self, groups: Sequence[GroupToSolve]) -> None:
        """Compute what is computed faster for all matrices of these groups at once; may leave ``shared`` empty.

        Args:
            groups: one, or several of experts, with matrices of the same shapes.
        """
        return

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


def solve_block(block: Block, groups: Iterable[Measured], solver: MatrixSolver[S]) -> dict[str, S]:
    """Solve for each linear, by name. ``block.details["tensors"]`` gets the rows, with seconds.

    Processes solve at the same time: each has some matrices of every group, or some of their outputs (`shared_out`). They
    exchange solutions when the block may be changed, and at the end.

    Args:
        groups: as they are measured; each is solved before another pass through the block, and placed as soon as the block may
            be changed.
    """
    processes = block.view.processes
    solutions: dict[str, S] = {}
    report: dict[str, Any] = {}
    waiting: list[tuple[TargetLinear, list[Portion[S]]]] = []
    loads = [0.0] * processes.world

    def exchange() -> None:
        for linear, shares in waiting:
            solutions[linear.name] = _exchanged(linear, shares, solver, processes)
            rows = [processes.broadcast_object(share.worker, share.row) for share in shares]
            report[linear.name] = _joined(rows, [len(share.linear.weight) for share in shares])

    for run in _runs(groups, solver.groups_together):
        divided = [shared_out(one.linears, solver.independent_outputs, loads) for one in run]
        own = [[share for shares in each for share in shares if share.worker == processes.rank] for each in divided]
        ready = [
            GroupToSolve([share.linear for share in shares], one.statistics, one.mismatch, {})
            for one, shares in zip(run, own, strict=True)
        ]
        start = time.perf_counter()
        solver.prepare(ready)
        each = (time.perf_counter() - start) / max(1, sum(map(len, own)))
        for group, shares in zip(ready, own, strict=True):
            for share in shares:
                start = time.perf_counter()
                share.solution, row = solver.solve(share.linear, group.statistics, group.mismatch, group.shared)
                share.row = row | {"seconds": round(each + time.perf_counter() - start, 3)}
            group.shared.clear()
        for one, shares_of in zip(run, divided, strict=True):
            waiting += zip(one.linears, shares_of, strict=True)
        free = run[-1].free
        del run, ready, group
        if free:
            exchange()
            for linear, _ in waiting:
                solver.place(linear, solutions[linear.name])
            waiting.clear()
            loads = [0.0] * processes.world
    exchange()
    block.details["tensors"] = report
    return solutions


def _runs(groups: Iterable[Measured], most: Callable[[Sequence[TargetLinear]], int]) -> Iterator[list[Measured]]:
    """The groups one by one; of experts, several of the same shapes that were measured by one pass. ``most``: so many."""
    run: list[Measured] = []
    for one in groups:
        if run and (len(run) >= most(one.linears) or not _alike(run[0], one)):
            yield run
            run = []
        run.append(one)
        last = not one.waiting
        del one  # its statistics may be large
        if last:
            yield run
            run = []


def _alike(one: Measured, other: Measured) -> bool:
    shapes, others = ([linear.weight.shape for linear in group.linears] for group in (one, other))
    experts = all(linear.owner is not None for linear in (*one.linears, *other.linears))
    return experts and shapes == others and one.free == other.free and one.mismatch is other.mismatch is None


def _exchanged(
    linear: TargetLinear, shares: Sequence[Portion[S]], solver: MatrixSolver[S], processes: ProcessGroup
) -> S:
    """The solution of a matrix, in every process."""
    first = shares[0]
    if first.linear.outputs is None:
        solution = first.solution if first.solution is not None else solver.blank(linear)
        processes.broadcast(first.worker, *solver.tensors(solution))
        return solution
    solution = solver.blank(linear)
    for share in shares:
        outputs = share.linear.outputs
        parts = [t[outputs] if len(t) == len(linear.weight) else t for t in solver.tensors(solution)]
        if share.solution is not None:
            for part, own in zip(parts, solver.tensors(share.solution), strict=True):
                part.copy_(own)
        processes.broadcast(share.worker, *parts)
    return solution


def _joined(rows: Sequence[dict[str, Any]], outputs: Sequence[int]) -> dict[str, Any]:
    """The report's row of a matrix from those of its portions.

    Their error over their outputs' energy, the longest time, and the mean of other numbers by outputs.
    """
    if len(rows) == 1:
        return rows[0]
    joined = {key: value for key, value in rows[0].items() if key != "energy"}
    for key in [key for key, value in joined.items() if isinstance(value, float)]:
        weights = [row["energy"] for row in rows] if key == "error" else outputs
        total = sum(weights)
        joined[key] = (
            sum(row[key] * weight for row, weight in zip(rows, weights, strict=True)) / total if total else 0.0
        )
    return joined | {"seconds": max(row["seconds"] for row in rows)}
