"""Casting one block of a sweep to codes: statistics ▶ grid ▶ GPTQ, then tuning of rounding, scales and floats beside them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.calibration.sites import Site
from compress.calibration.sweep import Block, Changed
from compress.calibration.tune import Moving, Tuning, floats, tune
from compress.checkpoint.grids import Grid
from compress.checkpoint.open import Codes
from compress.solvers.gptq import gptq, ordered_factor
from compress.solvers.grids import Scales, fit, nearest, to_codes, weights


@dataclass(frozen=True)
class Casting:
    """How to cast blocks.

    Attributes:
        tuning: of each block afterwards; None for none. grids: of every tensor to cast.
        scale_rate, float_rate: steps of scales, and of norms and biases, as shares of their own size; the tuning's own rate
            is in units of a code's width.
        dtypes: that scales are stored in, by tensor.
    """

    tuning: Tuning | None
    grids: Mapping[str, Grid]
    dtypes: Mapping[str, torch.dtype]
    scale_rate: float = 0.003
    float_rate: float = 0.01


class Rounded:
    """A site's weights as codes, with what they are rounded from."""

    def __init__(self, site: Site, grid: Grid, latent: torch.Tensor, scales: Scales, keep: torch.Tensor | None) -> None:
        self.site, self.grid, self.keep = site, grid, keep
        self.latent, self.scale, self.zero = latent, scales.scale, scales.zero
        self.overall = scales.overall
        #: Half the distance of the codes that lie furthest apart: what is further from its code lies outside the range.
        self.widest = 0.5 if grid.is_integer else 16.0 if grid.format == "fp8" else 1.0
        self._over = self._codes = torch.empty(0)

    def values(self) -> torch.Tensor:
        """The rounded weights [O, I]; what `collect` needs of them is kept."""
        shape = (len(self.latent), self.scale.shape[1], -1)
        self._over = self.latent.view(shape) / self.scale[..., None]
        if self.zero is None:
            self._codes = nearest(self._over.clone(), self.grid)
        else:
            self._codes = nearest(self._over + self.zero[..., None], self.grid).sub_(self.zero[..., None])
        values = (self._codes * self.scale[..., None]).view(self.latent.shape)
        return values if self.keep is None else values.masked_fill_(~self.keep, 0)

    def project(self) -> None:
        """Put the rounded weights into the block."""
        self.site.weight.copy_(self.values())

    def collect(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Gradients of the weights ▶ of latent weights (straight through) and of scales (LSQ, arXiv 1902.08153)."""
        whole, weight = parameters[self.site.parameter], self.site.weight
        assert whole.grad is not None
        assert whole.is_contiguous()
        start = weight.storage_offset() - whole.storage_offset()
        gradient = whole.grad.contiguous().as_strided(weight.shape, weight.stride(), start)
        if self.keep is not None:
            gradient = gradient.masked_fill(~self.keep, 0)
        over, codes = self._over, self._codes
        gradient = gradient.reshape(over.shape)
        # beyond the last code the weight no longer depends on the latent one
        error = codes - over
        outside = error.abs() > self.widest
        self.scale.grad = (gradient * torch.where(outside, codes, error)).sum(2)
        self.latent.grad = gradient.masked_fill(outside, 0).view(self.latent.shape)

    def finish(self, dtype: torch.dtype) -> Codes:
        """Codes, with scales in the dtype they are stored in; the block gets the weights that a loader will see."""
        scales = Scales(self.scale, self.zero, self.overall)
        codes = to_codes(self.latent, self.grid, scales, dtype, self.keep)
        self.site.weight.copy_(weights(codes, self.keep).to(self.site.weight.dtype))
        return codes


def cast_block(block: Block, how: Casting) -> dict[str, Changed]:
    """Cast the sites of a block in place; codes by tensor name.

    ``block.details`` gets a row for each matrix (relative output error, seconds) and, where it was tuned, the block's error
    before and after.
    """
    rounded: dict[str, Rounded] = {}
    rows: dict[str, Any] = {}
    ranks = block.sweep.ranks
    waiting: list[Rounded] = []
    for number, (group, statistics, free) in enumerate(block.statistics()):
        start = time.perf_counter()
        solver = number % ranks.world
        order, factor, damping = None, None, 0.01
        diagonal = statistics.hessian.diagonal() if statistics.tokens else None
        if statistics.tokens and solver == ranks.rank:
            order, factor, damping = ordered_factor(statistics.hessian)
            factor = factor.float()
        for site in group:
            grid = how.grids[site.name]
            keep = block.earlier_mask(site)
            weight = site.weight.float().contiguous()
            scales = fit(weight, grid, diagonal, keep)
            latent = weight.clone()
            if factor is not None:
                assert order is not None
                latent = gptq(weight, factor, order, grid, scales, keep)
            ranks.spread(solver, latent)
            found = rounded[site.name] = Rounded(site, grid, latent, scales, keep)
            row: dict[str, Any] = {"error": statistics.relative_error(weight, found.values())}
            if damping != 0.01:
                row["damping"] = damping
            if statistics.tokens == 0:
                row["note"] = "no token reached it: rounded to nearest"
            rows[site.name] = {"format": grid.format, "seconds": round(time.perf_counter() - start, 3), **row}
            waiting.append(found)
            start = time.perf_counter()
        if free:  # all statistics are those of the block as it came
            for done in waiting:
                done.project()
            waiting.clear()
    block.details["tensors"] = rows
    if how.tuning is not None and how.tuning.epochs:
        start = time.perf_counter()
        parameters = dict(block.module.named_parameters())
        rate = how.tuning.rate
        coded = {id(parameters[s.parameter]) for s in block.sites}
        moving = []
        for r in rounded.values():
            width = float(r.scale.abs().mean())
            moving.append(Moving(r.latent, width))
            if r.grid.is_integer or r.grid.format == "fp8":  # others have few scales to choose from
                moving.append(Moving(r.scale, width * how.scale_rate / rate))
        moving += [Moving(m.tensor, m.unit * how.float_rate / rate) for m in floats(block, coded)]

        def project() -> None:
            for r in rounded.values():
                r.project()

        def collect() -> None:
            for r in rounded.values():
                r.collect(parameters)

        block.details["tuning"] = tune(block, how.tuning, moving, project, collect) | {
            "seconds": round(time.perf_counter() - start, 3)
        }
    result = {}
    for name, r in rounded.items():
        keep = None if r.keep is None else (r.keep.T if r.site.transposed else r.keep).contiguous()
        result[name] = Changed(keep, r.finish(how.dtypes[name]))
    return result
