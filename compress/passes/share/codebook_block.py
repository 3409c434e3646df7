"""Clustering the weights of one block of a sweep: statistics ▶ codebook ▶ GPTQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.blockwise.asymmetric import Drift, statistics_of
from compress.blockwise.linears import Site, Statistics
from compress.blockwise.runner import Block, Changed
from compress.blockwise.solve import solve_block
from compress.checkpoint.open import Codes
from compress.solvers.codebook import codebook, rounded, to_codes
from compress.solvers.gptq import codebook_gptq, corrected, ordered_factor
from compress.solvers.quant_format import weights


@dataclass(frozen=True)
class Clustering:
    """How to cluster blocks: bits of the codes by tensor name, and the dtypes that codebooks are stored in."""

    bits: Mapping[str, int]
    dtypes: Mapping[str, torch.dtype]


def cluster_block(block: Block, how: Clustering) -> dict[str, Changed]:
    """Cluster the sites of a block in place; codes by tensor name, as the checkpoint shapes them.

    In a sweep with targets each matrix is matched to what the original gives on its own inputs, as in `cast_block`.
    ``block.details`` gets a row for each matrix: format, relative output error, seconds.
    """

    def solve(
        site: Site, statistics: Statistics, drift: Drift | None, shared: dict[str, Any]
    ) -> tuple[Codes, dict[str, Any]]:
        bits, dtype = how.bits[site.name], how.dtypes[site.name]
        found, row = _solve(site, statistics, drift, bits, dtype, block.earlier_mask(site), shared)
        return Codes(found.codes, found.scale.float()), {"format": f"codebook{bits}", **row}

    def blank(site: Site) -> Codes:
        codes = torch.empty_like(site.weight, dtype=torch.int8, memory_format=torch.contiguous_format)
        return Codes(codes, torch.empty(1 << how.bits[site.name], device=codes.device))

    found = solve_block(
        block,
        statistics_of(block),
        solve,
        blank=blank,
        tensors=lambda made: [made.codes, made.scale],
        place=lambda site, made: site.weight.copy_(weights(made, block.earlier_mask(site))),
    )
    result = {}
    for site in block.sites:
        codes, keep = found[site.name].codes, block.earlier_mask(site)
        if site.transposed:
            codes, keep = codes.T, None if keep is None else keep.T
        result[site.name] = Changed(keep, Codes(codes, found[site.name].scale.to(how.dtypes[site.name])))
    return result


def _solve(
    site: Site,
    statistics: Statistics,
    drift: Drift | None,
    bits: int,
    dtype: torch.dtype,
    keep: torch.Tensor | None,
    shared: dict[str, Any],
) -> tuple[Codes, dict[str, Any]]:
    """Codes [O, I] and their codebook, and what is worth saying. ``shared``: of sites with the same inputs."""
    weight = site.weight.float().contiguous()
    if statistics.tokens == 0:
        note = "no token reached it: clustered by its weights alone"
        return rounded(weight, bits, dtype, None, keep), {"error": None, "note": note}
    H = statistics.hessian
    if not shared:
        shared["order"], shared["factor"], shared["damping"] = ordered_factor(H)
    order, factor = shared["order"], shared["factor"]
    if drift is not None:
        weight = corrected(weight, drift.inputs, drift.residual.get(site.name), factor, order)
    book = codebook(weight, bits, H.diagonal(), keep).to(weight.device, dtype)
    codes = to_codes(codebook_gptq(weight, factor.float(), order, book, keep), book, keep)
    row: dict[str, Any] = {"error": statistics.relative_error(weight, weights(codes, keep))}
    if shared["damping"] != 0.01:
        row["damping"] = shared["damping"]
    return codes, row
