"""Clustering the weights of one block: statistics ▶ codebook ▶ GPTQ ▶ place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.blockwise.asymmetric import statistics_of
from compress.blockwise.block import Block
from compress.blockwise.correction import InputMismatch, corrected
from compress.blockwise.hessians import InputStatistics
from compress.blockwise.linears import TargetLinear
from compress.blockwise.results import TensorExtras
from compress.blockwise.solve import MatrixSolver, solve_block
from compress.checkpoint.values import Codes
from compress.solvers.codebook import codebook, rounded, to_codes
from compress.solvers.gptq import act_order_factor, codebook_gptq
from compress.solvers.quant_format import dequantize


@dataclass(frozen=True)
class CodebookOptions:
    """Bits of the codes and dtypes of the stored codebooks, by tensor name."""

    bits: Mapping[str, int]
    dtypes: Mapping[str, torch.dtype]


class CodebookSolver(MatrixSolver[Codes]):
    """Solver of `codebook_block`."""

    def __init__(self, block: Block, options: CodebookOptions) -> None:
        self._block, self._options = block, options

    def solve(
        self, linear: TargetLinear, statistics: InputStatistics, mismatch: InputMismatch | None, shared: dict[str, Any]
    ) -> tuple[Codes, dict[str, Any]]:
        """Codes and codebook of a matrix, with its row for the report."""
        bits, dtype = self._options.bits[linear.name], self._options.dtypes[linear.name]
        keep = self._block.earlier_mask(linear)
        codes, row = _solve(linear, statistics, mismatch, bits, dtype, keep, shared)
        return Codes(codes.codes, codes.scale.float()), {"format": f"codebook{bits}", **row}

    def blank(self, linear: TargetLinear) -> Codes:
        """Codes and codebook of the right shapes."""
        codes = torch.empty_like(linear.weight, dtype=torch.int8, memory_format=torch.contiguous_format)
        return Codes(codes, torch.empty(1 << self._options.bits[linear.name], device=codes.device))

    def tensors(self, solution: Codes) -> list[torch.Tensor]:
        """Codes and codebook."""
        return [solution.codes, solution.scale]

    def place(self, linear: TargetLinear, solution: Codes) -> None:
        """Write the clustered weights into the block."""
        linear.weight.copy_(dequantize(solution, self._block.earlier_mask(linear)))


def codebook_block(block: Block, options: CodebookOptions) -> dict[str, TensorExtras]:
    """Cluster the linears of a block in place; return codes by tensor name, shaped as in the checkpoint.

    In a run with targets each matrix is fitted to the original's outputs on the original's inputs, as in `cast_block`.
    ``block.details`` gets a row for each matrix: format, relative output error, seconds.
    """
    clustered = solve_block(block, statistics_of(block), CodebookSolver(block, options))
    result = {}
    for linear in block.linears:
        solution, keep = clustered[linear.name], block.earlier_mask(linear)
        codes = solution.codes
        if linear.transposed:
            codes, keep = codes.T, None if keep is None else keep.T
        result[linear.name] = TensorExtras(keep, Codes(codes, solution.scale.to(options.dtypes[linear.name])))
    return result


def _solve(
    linear: TargetLinear,
    statistics: InputStatistics,
    mismatch: InputMismatch | None,
    bits: int,
    dtype: torch.dtype,
    keep: torch.Tensor | None,
    shared: dict[str, Any],
) -> tuple[Codes, dict[str, Any]]:
    """Codes [O, I], codebook and row for the report. ``shared`` holds results for linears with the same inputs."""
    weight = linear.weight.float().contiguous()
    if statistics.tokens == 0:
        note = "no token reached it: clustered by its weights alone"
        return rounded(weight, bits, dtype, None, keep), {"error": None, "note": note}
    H = statistics.hessian
    if mismatch is not None:
        weight = corrected(linear, weight, H, mismatch, shared)
    if "order" not in shared:
        shared["order"], shared["factor"], shared["damping"] = act_order_factor(H)
    order, factor = shared["order"], shared["factor"]
    book = codebook(weight, bits, H.diagonal(), keep).to(weight.device, dtype)
    codes = to_codes(codebook_gptq(weight, factor.float(), order, book, keep), book, keep)
    row: dict[str, Any] = {"error": statistics.relative_error(weight, dequantize(codes, keep))}
    if shared["damping"] != 0.01:
        row["damping"] = shared["damping"]
    return codes, row
