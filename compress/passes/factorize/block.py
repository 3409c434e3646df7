"""Factors in place of the matrices of one block of a sweep: statistics ▶ the nearest product of low rank, then tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.blockwise.asymmetric import Drift, statistics_of
from compress.blockwise.linears import Site, Statistics
from compress.blockwise.probe import on_trial
from compress.blockwise.reconstruct import Moving, Tuning, floats, tune
from compress.blockwise.runner import Block, Changed, Sweep
from compress.blockwise.solve import solve_block
from compress.solvers.gptq import corrected, ordered_factor
from compress.solvers.low_rank import low_rank


@dataclass(frozen=True)
class Factoring:
    """How to factorise blocks.

    Attributes:
        ranks: by tensor. dtypes: that factors are stored in, by tensor. tuning: of each block afterwards; None for none.
    """

    ranks: Mapping[str, int]
    dtypes: Mapping[str, torch.dtype]
    tuning: Tuning | None


@dataclass
class Pair:
    """A site's factors; tuning moves them."""

    site: Site
    up: torch.Tensor
    down: torch.Tensor

    def project(self) -> None:
        """Put the product into the block."""
        self.site.weight.copy_(self.up @ self.down)

    def collect(self, gradient: torch.Tensor) -> None:
        """Gradients of the factors from that of the product [O, I]."""
        self.up.grad, self.down.grad = gradient @ self.down.T, self.up.T @ gradient

    def finish(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors as they are stored; the block gets what a loader will see."""
        up, down = self.up.to(dtype), self.down.to(dtype)
        self.site.weight.copy_(up.float() @ down.float())
        return up, down


def factor_block(block: Block, how: Factoring) -> dict[str, Changed]:
    """Factorise the sites of a block in place.

    In a sweep with targets each product is matched to what the original gives on its own inputs. ``block.details`` gets a row
    for each matrix (rank, relative output error, seconds) and, where it was tuned, the block's error before and after.
    """

    def solve(
        site: Site, statistics: Statistics, drift: Drift | None, shared: dict[str, Any]
    ) -> tuple[Pair, dict[str, Any]]:
        rank = how.ranks[site.name]
        up, down, row = _solve(site, statistics, drift, rank, shared)
        return Pair(site, up, down), {"rank": rank, **row}

    def blank(site: Site) -> Pair:
        (outputs, inputs), rank = site.weight.shape, how.ranks[site.name]
        return Pair(site, site.weight.new_empty(outputs, rank), site.weight.new_empty(rank, inputs))

    pairs = solve_block(
        block,
        statistics_of(block),
        solve,
        blank=blank,
        tensors=lambda made: [made.up, made.down],
        place=lambda site, made: made.project(),
    )
    if how.tuning is not None and how.tuning.epochs:
        _tune(block, how.tuning, list(pairs.values()))
    return {name: Changed(factors=pair.finish(how.dtypes[name])) for name, pair in pairs.items()}


def _tune(block: Block, tuning: Tuning, pairs: list[Pair]) -> None:
    parameters = dict(block.module.named_parameters())
    product = {id(parameters[pair.site.parameter]) for pair in pairs}
    moving = [Moving(t, float(t.square().mean().sqrt())) for pair in pairs for t in (pair.up, pair.down)]

    def project() -> None:
        for pair in pairs:
            pair.project()

    def collect() -> None:
        for pair in pairs:
            gradient = parameters[pair.site.parameter].grad
            assert gradient is not None
            pair.collect(gradient.T if pair.site.transposed else gradient)

    block.details["tuning"] = tune(block, tuning, moving + floats(block, product), project, collect)


def _solve(
    site: Site, statistics: Statistics, drift: Drift | None, rank: int, shared: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Factors, and what is worth saying. ``shared``: of sites with the same inputs."""
    weight = before = site.weight.float().contiguous()
    hessian = statistics.hessian
    if drift is not None:
        if "order" not in shared:
            shared["order"], shared["factor"], _ = ordered_factor(hessian)
        weight = corrected(weight, drift.inputs, drift.residual.get(site.name), shared["factor"], shared["order"])
    up, down, _, damping = low_rank(weight, hessian, rank)
    row: dict[str, Any] = {"error": statistics.relative_error(before, up @ down)}
    if damping > 1e-6:
        row["damping"] = damping
    return up.to(site.weight.dtype), down.to(site.weight.dtype), row


def factor_on_trial(
    sweep: Sweep, ranks: Mapping[str, int]
) -> tuple[Callable[[str], dict[str, torch.Tensor]], dict[str, list[float]]]:
    """What factorising each wanted matrix alone at those ranks would change, see `trials.on_trial`.

    Returns:
        A function from a tensor's name to its ΔW, under ``trial``; and of each tensor the energies, see `low_rank`.
    """

    def measure(block: Block) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        energies = {}
        for group, statistics, _ in block.statistics():
            for site in group if not sweep.ranks.rank else ():
                up, down, found, _ = low_rank(site.weight.float(), statistics.hessian, ranks[site.name])
                energies[site.name] = found.tolist()
                yield site.name, {"trial": up @ down - site.weight}
        block.details["energies"] = sweep.ranks.tell(0, energies)

    read, rows = on_trial(sweep, "factorising on trial", measure)
    return read, {name: found for row in rows for name, found in row.get("energies", {}).items()}
