"""Which format each matrix gets within a budget: exact costs from headers, losses measured or assumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from compress.checkpoint.codecs import parts, stock_chain, with_storage
from compress.checkpoint.grids import Grid
from compress.checkpoint.layout import lay_out
from compress.checkpoint.spec import Spec
from compress.errors import PassError
from compress.solvers.knapsack import choose


@dataclass(frozen=True)
class Budget:
    """Bits per weight on average over what is cast, scales included; or bytes of the whole checkpoint."""

    bits: float | None
    max_bytes: int | None
    formats: tuple[str, ...]


def bytes_of(spec: Spec, name: str, grid: Grid) -> int:
    """Stored bytes of a tensor as such codes."""
    return sum(
        part.bytes for part in parts(replace(spec.tensors[name], kept=None, grid=grid, storage=stock_chain(grid)))
    )


def assumed(count: int, grid: Grid) -> float:
    """A loss for plans, before anything is measured: rounding errors fall by four with each bit."""
    return count * 4.0**-grid.bits


def allocate(
    spec: Spec,
    groups: Sequence[Sequence[str]],
    budget: Budget,
    grids: Callable[[str, str], Grid],
    losses: Mapping[str, Mapping[str, float]],
) -> dict[str, Grid]:
    """The grid of every tensor, of least total loss within the budget; tensors of a group get the same format.

    Raises:
        PassError: even the smallest formats exceed the budget; it says how small they get.
    """
    names = [name for group in groups for name in group]
    costs = [[sum(bytes_of(spec, n, grids(n, f)) for n in group) for f in budget.formats] for group in groups]
    values = [[sum(losses[n][f] for n in group) for f in budget.formats] for group in groups]
    least = sum(min(row) for row in costs)
    count = sum(spec.tensors[n].count for n in names)
    if budget.bits is not None:
        room, beside = int(budget.bits * count / 8), 0
    else:
        assert budget.max_bytes is not None
        beside = _whole(spec, {n: grids(n, budget.formats[0]) for n in names}) - sum(row[0] for row in costs)
        room = budget.max_bytes - beside
    while True:
        chosen = choose(costs, values, room)
        if chosen is None:
            smallest = f"bits: {8 * least / count:.2f}" if budget.bits is not None else f"max_bytes: {beside + least:,}"
            raise PassError(
                f"even the smallest formats need more: {smallest.replace(',', '_')} is the least possible",
                key="bits" if budget.bits is not None else "max_bytes",
            )
        result = {n: grids(n, budget.formats[i]) for group, i in zip(groups, chosen, strict=True) for n in group}
        if budget.max_bytes is None or (over := _whole(spec, result) - budget.max_bytes) <= 0:
            return result
        room -= over  # headers are a few bytes longer with some formats than with others


def curve(
    spec: Spec,
    groups: Sequence[Sequence[str]],
    budget: Budget,
    grids: Callable[[str, str], Grid],
    losses: Mapping[str, Mapping[str, float]],
) -> list[tuple[float, float]]:
    """Bits per weight, in halves, and the least total loss with them."""
    points = []
    for half in range(4, 17):
        try:
            chosen = allocate(spec, groups, Budget(half / 2, None, budget.formats), grids, losses)
        except PassError:  # fewer than the smallest formats take
            continue
        points.append((half / 2, sum(losses[n][g.format] for n, g in chosen.items())))
    return points


def _whole(spec: Spec, grids: Mapping[str, Grid]) -> int:
    """Bytes of all weight files of the checkpoint with these grids."""
    coded = spec.map(lambda t: replace(t, grid=grids[t.name]) if t.name in grids else t)
    return lay_out(with_storage(coded, "stock"), 1 << 62).bytes
