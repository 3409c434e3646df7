"""Clustering the weights of one block of a sweep: statistics ▶ codebook ▶ GPTQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.blockwise.asymmetric import InputMismatch, statistics_of
from compress.blockwise.linears import InputStatistics, TargetLinear
from compress.blockwise.runner import Block, TensorExtras
from compress.blockwise.solve import solve_block
from compress.checkpoint.open import Codes
from compress.solvers.codebook import codebook, rounded, to_codes
from compress.solvers.gptq import act_order_factor, asymmetric_target, codebook_gptq
from compress.solvers.quant_format import dequantize


@dataclass(frozen=True)
class CodebookOptions:
    """How to cluster blocks: bits of the codes by tensor name, and the dtypes that codebooks are stored in."""

    bits: Mapping[str, int]
    dtypes: Mapping[str, torch.dtype]


def codebook_block(block: Block, options: CodebookOptions) -> dict[str, TensorExtras]:
    """Cluster the sites of a block in place; codes by tensor name, as the checkpoint shapes them.

    In a sweep with targets each matrix is matched to what the original gives on its own inputs, as in `cast_block`.
    ``block.details`` gets a row for each matrix: format, relative output error, seconds.
    """

    def solve(
        linear: TargetLinear, statistics: InputStatistics, mismatch: InputMismatch | None, shared: dict[str, Any]
    ) -> tuple[Codes, dict[str, Any]]:
        bits, dtype = options.bits[linear.name], options.dtypes[linear.name]
        found, row = _solve(linear, statistics, mismatch, bits, dtype, block.earlier_mask(linear), shared)
        return Codes(found.codes, found.scale.float()), {"format": f"codebook{bits}", **row}

    def blank(linear: TargetLinear) -> Codes:
        codes = torch.empty_like(linear.weight, dtype=torch.int8, memory_format=torch.contiguous_format)
        return Codes(codes, torch.empty(1 << options.bits[linear.name], device=codes.device))

    found = solve_block(
        block,
        statistics_of(block),
        solve,
        blank=blank,
        tensors=lambda made: [made.codes, made.scale],
        place=lambda linear, made: linear.weight.copy_(dequantize(made, block.earlier_mask(linear))),
    )
    result = {}
    for linear in block.linears:
        codes, keep = found[linear.name].codes, block.earlier_mask(linear)
        if linear.transposed:
            codes, keep = codes.T, None if keep is None else keep.T
        result[linear.name] = TensorExtras(keep, Codes(codes, found[linear.name].scale.to(options.dtypes[linear.name])))
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
    """Codes [O, I] and their codebook, and what is worth saying. ``shared``: of sites with the same inputs."""
    weight = linear.weight.float().contiguous()
    if statistics.tokens == 0:
        note = "no token reached it: clustered by its weights alone"
        return rounded(weight, bits, dtype, None, keep), {"error": None, "note": note}
    H = statistics.hessian
    if not shared:
        shared["order"], shared["factor"], shared["damping"] = act_order_factor(H)
    order, factor = shared["order"], shared["factor"]
    if mismatch is not None:
        weight = asymmetric_target(weight, mismatch.inputs, mismatch.residual.get(linear.name), factor, order)
    book = codebook(weight, bits, H.diagonal(), keep).to(weight.device, dtype)
    codes = to_codes(codebook_gptq(weight, factor.float(), order, book, keep), book, keep)
    row: dict[str, Any] = {"error": statistics.relative_error(weight, dequantize(codes, keep))}
    if shared["damping"] != 0.01:
        row["damping"] = shared["damping"]
    return codes, row
