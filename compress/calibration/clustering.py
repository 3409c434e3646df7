"""Clustering the weights of one block of a sweep: statistics ▶ codebook ▶ GPTQ."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.calibration.paired import Drift, statistics_of
from compress.calibration.sites import Site, Statistics
from compress.calibration.sweep import Block, Changed
from compress.checkpoint.open import Codes
from compress.solvers.codebook import codebook, rounded, to_codes
from compress.solvers.gptq import codebook_gptq, corrected, ordered_factor
from compress.solvers.grids import weights


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
    result: dict[str, Changed] = {}
    rows: dict[str, Any] = {}
    ranks = block.sweep.ranks
    waiting: list[tuple[Site, torch.Tensor]] = []
    for number, (group, statistics, drift, free) in enumerate(statistics_of(block)):
        solver = number % ranks.world  # of several processes one solves the group, the others get what it found
        shared: dict[str, Any] = {}
        for site in group:
            start = time.perf_counter()
            bits, dtype, keep = how.bits[site.name], how.dtypes[site.name], block.earlier_mask(site)
            if solver == ranks.rank:
                found, row = _solve(site, statistics, drift, bits, dtype, keep, shared)
            else:
                codes = torch.empty_like(site.weight, dtype=torch.int8, memory_format=torch.contiguous_format)
                found, row = Codes(codes, torch.empty(1 << bits, device=codes.device)), {}
            codes, book = found.codes, found.scale.float()
            ranks.spread(solver, codes, book)
            row = ranks.tell(solver, row)
            rows[site.name] = {"format": f"codebook{bits}", "seconds": round(time.perf_counter() - start, 3), **row}
            waiting.append((site, weights(Codes(codes, book), keep)))
            if site.transposed:
                codes, keep = codes.T, None if keep is None else keep.T
            result[site.name] = Changed(keep, Codes(codes, book.to(dtype)))
        if free:
            for done, weight in waiting:
                done.weight.copy_(weight)
            waiting.clear()
    block.details["tensors"] = rows
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
        return rounded(weight, bits, dtype, None, keep), {"note": "no token reached it: clustered by its weights alone"}
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
