"""Matrices of a block shared out among processes: whole ones by cost, or some outputs to each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from compress.blockwise.linears import TargetLinear

S = TypeVar("S")
#: Outputs are shared out in so many at a time, so that products take the same way as those of whole matrices.
_STEP = 16


@dataclass
class Portion(Generic[S]):
    """A matrix, or some outputs of it, that one process solves for.

    Attributes:
        linear: the matrix, or some outputs of it. worker: the process.
        solution, row: what that process found, and its row for the report; None elsewhere.
    """

    linear: TargetLinear
    worker: int
    solution: S | None = None
    row: dict[str, Any] | None = None


def shared_out(
    group: Sequence[TargetLinear], independent: Callable[[TargetLinear], bool], loads: list[float]
) -> list[list[Portion[Any]]]:
    """The shares of each matrix of a group, one or more; ``loads`` of the processes grow by those of whole matrices.

    Args:
        independent: whether a matrix's outputs do not depend on one another. Where this is so of all, each process gets as
            many outputs of the group. Experts stay whole: there are enough of them.
    """
    if len(loads) > 1 and all(linear.owner is None and independent(linear) for linear in group):
        return by_outputs(group, len(loads))
    workers = by_cost([linear.weight.shape[0] * linear.weight.shape[1] ** 2 for linear in group], loads)
    return [[Portion(linear, worker)] for linear, worker in zip(group, workers, strict=True)]


def by_cost(costs: Sequence[float], loads: list[float]) -> list[int]:
    """The worker of each item: the dearest first, each to the worker with the least load; ``loads`` grows by the costs."""
    workers = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        workers[item] = min(range(len(loads)), key=loads.__getitem__)
        loads[workers[item]] += costs[item]
    return workers


def by_outputs(group: Sequence[TargetLinear], workers: int) -> list[list[Portion[Any]]]:
    """Shares of about as many outputs for each worker, those of one matrix after those of another."""
    total, before = sum(len(linear.weight) for linear in group), 0
    shares: list[list[Portion[Any]]] = []
    for linear in group:
        outputs = len(linear.weight)
        own: list[Portion[Any]] = []
        bounds = [(total * worker / workers - before) / _STEP for worker in range(workers)]
        cuts = [*(min(max(0, round(bound) * _STEP), outputs) for bound in bounds), outputs]
        for worker, (start, stop) in enumerate(itertools.pairwise(cuts)):
            if stop - start == outputs:
                own.append(Portion(linear, worker))
            elif stop > start:
                own.append(Portion(linear.with_outputs(slice(start, stop)), worker))
        shares.append(own)
        before += outputs
    return shares
