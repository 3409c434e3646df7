"""Pruning one block: statistics ▶ solver ▶ masks, then reconstruction of the kept weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from compress.blockwise.asymmetric import symmetric_statistics
from compress.blockwise.block import Block
from compress.blockwise.correction import InputMismatch
from compress.blockwise.hessians import InputStatistics
from compress.blockwise.linears import TargetLinear
from compress.blockwise.reconstruct import Reconstruction, reconstruct_block, trainable_floats
from compress.blockwise.results import TensorExtras, extras_by_tensor
from compress.blockwise.runner import BlockRunner
from compress.blockwise.solve import MatrixSolver, solve_block
from compress.solvers.alps import alps, problem
from compress.solvers.hessian import inverse_factor
from compress.solvers.magnitude import keep_largest, keep_n_of_m
from compress.solvers.owl import outliers, owl_sparsities
from compress.solvers.sparsegpt import sparsegpt
from compress.solvers.wanda import keep_wanda

Method = Literal["wanda", "sparsegpt", "alps"]


@dataclass(frozen=True)
class PruneOptions:
    """How to prune blocks.

    Attributes:
        sparsity: share to remove by tensor name; None with a pattern.
        pattern: (n, m) along the inputs.
        reconstruction: reconstruction of each block afterwards; None for none.
    """

    method: Method
    sparsity: Mapping[str, float] | None
    pattern: tuple[int, int] | None
    reconstruction: Reconstruction | None


def owl_allocation(runner: BlockRunner, sparsity: float) -> tuple[dict[str, float], dict[str, Any]]:
    """Sparsity of every wanted tensor by OWL, and for the report each block's share of outliers and its sparsity.

    Runs over the blocks as they are; ``runner`` has a workspace of its own.
    """

    def count_outliers(block: Block) -> dict[str, TensorExtras]:
        names, many, seen, count = [], 0, 0, 0
        for group, statistics, _ in block.statistics():
            for linear in group:
                names.append(linear.tensor)
                count += linear.weight.numel()
                if statistics.tokens:  # an expert without tokens has no statistics
                    over, size = outliers(linear.weight, statistics.hessian.diagonal())
                    many, seen = many + over, seen + size
        block.details["outliers"] = [names, many / max(seen, 1), count]
        return {}

    rows = [row["outliers"] for row in runner.run(count_outliers, "counting outliers").details if "outliers" in row]
    ratios = [ratio for _, ratio, _ in rows]
    chosen = owl_sparsities(ratios, [count for _, _, count in rows], sparsity)
    by_name = {name: share for (names, _, _), share in zip(rows, chosen, strict=True) for name in names}
    return by_name, {"outlier_share": ratios, "sparsity": chosen}


def pruned_on_trial(
    block: Block,
    linear: TargetLinear,
    statistics: InputStatistics,
    method: Method,
    sparsities: Sequence[float],
    shared: dict[str, Any],
) -> list[torch.Tensor]:
    """Change ΔW [O, I] of a matrix at each sparsity, bfloat16; ``shared`` is that of `_solve`."""
    earlier, changes = block.earlier_mask(linear), []
    for sparsity in sparsities:
        options = PruneOptions(method, {linear.tensor: sparsity}, None, None)
        weight, mask, _ = _solve(linear, statistics, options, earlier, shared)
        changes.append((weight.masked_fill(~mask, 0) - linear.weight).bfloat16())
    return changes


@dataclass(frozen=True)
class Pruned:
    """New weights [O, I] of a matrix, zero where the mask [O, I] is False."""

    weight: torch.Tensor
    mask: torch.Tensor


class PruneSolver(MatrixSolver[Pruned]):
    """Solver of `prune_block`."""

    def __init__(self, block: Block, options: PruneOptions) -> None:
        self._block, self._options = block, options

    def independent_outputs(self, linear: TargetLinear) -> bool:
        """N of M, except by ALPS: otherwise scores of all outputs are compared, or all stop together."""
        return self._options.pattern is not None and self._options.method != "alps"

    def solve(
        self, linear: TargetLinear, statistics: InputStatistics, mismatch: InputMismatch | None, shared: dict[str, Any]
    ) -> tuple[Pruned, dict[str, Any]]:
        """New weights and mask of a matrix, with its row for the report."""
        weight, mask, notes = _solve(linear, statistics, self._options, self._block.earlier_mask(linear), shared)
        weight, mask = weight.masked_fill(~mask, 0).contiguous(), mask.contiguous()
        row = {**statistics.error_row(linear.weight, weight, linear.outputs is not None), **notes}
        return Pruned(weight, mask), row | {"sparsity": 1 - float(mask.double().mean())}

    def blank(self, linear: TargetLinear) -> Pruned:
        """Weights and mask of the right shape."""
        weight = torch.empty_like(linear.weight, memory_format=torch.contiguous_format)
        return Pruned(weight, torch.empty_like(weight, dtype=torch.bool))

    def tensors(self, solution: Pruned) -> list[torch.Tensor]:
        """Weights and mask."""
        return [solution.weight, solution.mask]

    def place(self, linear: TargetLinear, solution: Pruned) -> None:
        """Write the pruned weights into the block."""
        linear.weight.copy_(solution.weight)


def prune_block(block: Block, options: PruneOptions) -> dict[str, TensorExtras]:
    """Prune the linears of a block in place; return keep-masks by tensor name, shaped as in the checkpoint.

    ``block.details`` gets a row for each matrix (relative output error, sparsity, seconds) and, with reconstruction, the
    block's error before and after.
    """
    tuned = options.reconstruction is not None and options.reconstruction.epochs > 0
    pruned = solve_block(block, symmetric_statistics(block, tuned=tuned), PruneSolver(block, options))
    masks = {name: solution.mask for name, solution in pruned.items()}
    pruned.clear()
    if options.reconstruction is not None and tuned:
        removed = [(linear.weight, masks[linear.name].logical_not_()) for linear in block.linears]

        def project() -> None:
            for weight, gone in removed:
                weight.masked_fill_(gone, 0)

        block.details["tuning"] = reconstruct_block(block, options.reconstruction, trainable_floats(block), project)
        for mask in masks.values():
            mask.logical_not_()
    return extras_by_tensor([(linear, masks[linear.name], None) for linear in block.linears])


def _solve(
    linear: TargetLinear,
    statistics: InputStatistics,
    options: PruneOptions,
    earlier: torch.Tensor | None,
    shared: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """New weights [O, I], mask, and notes for the report. ``shared`` holds results for linears with the same inputs."""
    weight, pattern = linear.weight.contiguous(), options.pattern
    share = None if options.sparsity is None else options.sparsity[linear.tensor]
    if share == 0:
        return weight, torch.ones_like(weight, dtype=torch.bool) if earlier is None else earlier, {}
    if statistics.tokens == 0:  # an expert without tokens: only its weights are known
        if pattern is not None:
            mask = keep_n_of_m(weight, *pattern, earlier=earlier)
        else:
            assert share is not None
            mask = keep_largest(weight, weight.numel() - round(share * weight.numel()), earlier)
        return weight, mask, {"note": "no token reached it: pruned by magnitude"}
    if options.method == "wanda":
        return weight, keep_wanda(weight, statistics.hessian.diagonal(), share, pattern, earlier), {}
    if options.method == "sparsegpt":
        if "factor" not in shared:
            shared["factor"], shared["damping"] = inverse_factor(statistics.hessian)
        notes = {} if shared["damping"] == 0.01 else {"damping": shared["damping"]}
        factor = shared["factor"].float()
        return *sparsegpt(weight, factor, sparsity=share, pattern=pattern, earlier=earlier), notes
    if "problem" not in shared:
        shared["problem"] = problem(statistics.hessian)
    notes = {} if shared["problem"].damping == 0.01 else {"damping": shared["problem"].damping}
    kept = None if share is None else weight.numel() - round(share * weight.numel())
    return *alps(weight, shared["problem"], kept=kept, pattern=pattern, earlier=earlier), notes
