"""Low-rank factors for the matrices of one block: statistics ▶ nearest product ▶ place, then reconstruction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from compress.blockwise.asymmetric import statistics_of
from compress.blockwise.block import Block
from compress.blockwise.correction import InputMismatch, corrected
from compress.blockwise.hessians import InputStatistics
from compress.blockwise.linears import TargetLinear
from compress.blockwise.probe import ProbeFn
from compress.blockwise.reconstruct import (
    ComputedParameter,
    Reconstruction,
    TrainableTensor,
    reconstruct_block,
    trainable_floats,
)
from compress.blockwise.results import TensorExtras
from compress.blockwise.solve import MatrixSolver, solve_block
from compress.solvers.low_rank import low_rank


@dataclass(frozen=True)
class FactorOptions:
    """How to factorise blocks.

    Attributes:
        ranks: by tensor.
        dtypes: dtypes of the stored factors, by tensor.
        reconstruction: reconstruction of each block afterwards; None for none.
    """

    ranks: Mapping[str, int]
    dtypes: Mapping[str, torch.dtype]
    reconstruction: Reconstruction | None


@dataclass
class Pair:
    """The factors of a matrix. Reconstruction trains them."""

    linear: TargetLinear
    up: torch.Tensor
    down: torch.Tensor

    def project(self) -> None:
        """Write the product into the block."""
        self.linear.weight.copy_(self.up @ self.down)

    def chain_gradients(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Set the gradients of the factors from that of the product."""
        gradient = parameters[self.linear.parameter].grad
        if gradient is None:  # the block does not use it on text, such as LUKE's queries of entities
            return
        gradient = gradient.T if self.linear.transposed else gradient
        self.up.grad, self.down.grad = gradient @ self.down.T, self.up.T @ gradient

    def finish(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors in their stored dtype, and write the product that a loader will see into the block."""
        up, down = self.up.to(dtype), self.down.to(dtype)
        self.linear.weight.copy_(up.float() @ down.float())
        return up, down


class FactorSolver(MatrixSolver[Pair]):
    """Solver of `factor_block`."""

    def __init__(self, ranks: Mapping[str, int]) -> None:
        self._ranks = ranks

    def solve(
        self, linear: TargetLinear, statistics: InputStatistics, mismatch: InputMismatch | None, shared: dict[str, Any]
    ) -> tuple[Pair, dict[str, Any]]:
        """Factors of a matrix, with its row for the report."""
        rank = self._ranks[linear.name]
        up, down, row = _solve(linear, statistics, mismatch, rank, shared)
        return Pair(linear, up, down), {"rank": rank, **row}

    def blank(self, linear: TargetLinear) -> Pair:
        """Factors of the right shapes."""
        (outputs, inputs), rank = linear.weight.shape, self._ranks[linear.name]
        return Pair(linear, linear.weight.new_empty(outputs, rank), linear.weight.new_empty(rank, inputs))

    def tensors(self, solution: Pair) -> list[torch.Tensor]:
        """Both factors."""
        return [solution.up, solution.down]

    def place(self, linear: TargetLinear, solution: Pair) -> None:
        """Write the product into the block."""
        solution.project()


def factor_block(block: Block, options: FactorOptions) -> dict[str, TensorExtras]:
    """Factorise the linears of a block in place; return the factors by tensor name.

    In a run with targets each product is fitted to the original's outputs on the original's inputs. ``block.details`` gets a
    row for each matrix (rank, relative output error, seconds) and, with reconstruction, the block's error before and after.
    """
    tuned = options.reconstruction is not None and options.reconstruction.epochs > 0
    pairs = solve_block(block, statistics_of(block, tuned=tuned), FactorSolver(options.ranks))
    if options.reconstruction is not None and tuned:
        _reconstruct(block, options.reconstruction, list(pairs.values()))
    return {name: TensorExtras(factors=pair.finish(options.dtypes[name])) for name, pair in pairs.items()}


def _reconstruct(block: Block, reconstruction: Reconstruction, pairs: list[Pair]) -> None:
    parameters = dict(block.module.named_parameters())
    product = {id(parameters[pair.linear.parameter]) for pair in pairs}
    trainable = [TrainableTensor(t, float(t.square().mean().sqrt())) for pair in pairs for t in (pair.up, pair.down)]

    def project() -> None:
        for pair in pairs:
            pair.project()

    derived = [
        ComputedParameter(
            parameters[pair.linear.parameter], (pair.up, pair.down), partial(pair.chain_gradients, parameters)
        )
        for pair in pairs
    ]
    block.details["tuning"] = reconstruct_block(
        block, reconstruction, trainable + trainable_floats(block, product), project, derived
    )


def _solve(
    linear: TargetLinear, statistics: InputStatistics, mismatch: InputMismatch | None, rank: int, shared: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Factors, and the row for the report. ``shared`` holds results for linears with the same inputs."""
    weight = before = linear.weight.float().contiguous()
    hessian = statistics.hessian
    if mismatch is not None:
        weight = corrected(linear, weight, hessian, mismatch, shared)
    up, down, _, damping = low_rank(weight, hessian, rank)
    row: dict[str, Any] = {"error": statistics.relative_error(before, up @ down)}
    if damping > 1e-6:
        row["damping"] = damping
    return up.to(linear.weight.dtype), down.to(linear.weight.dtype), row


def probe_factors(ranks: Mapping[str, int]) -> ProbeFn:
    """Change of each wanted matrix of a block if it alone were factorised at these ranks, under ``trial``.

    ``block.details["energies"]`` gets the energies of each tensor, see `low_rank`.
    """

    def measure(block: Block) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        energies = block.details.setdefault("energies", {})
        for group, statistics, _ in block.statistics():
            for linear in group:
                up, down, spectrum, _ = low_rank(linear.weight.float(), statistics.hessian, ranks[linear.name])
                energies[linear.name] = spectrum.tolist()
                yield linear.name, {"trial": (up @ down - linear.weight).bfloat16()}

    return measure
