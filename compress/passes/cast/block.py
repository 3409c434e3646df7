"""Casting one block of a sweep to codes: statistics ▶ grid ▶ GPTQ ▶ descent, then tuning of scales and floats beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.blockwise.asymmetric import Drift, statistics_of, unpaired_statistics
from compress.blockwise.linears import Site, Statistics
from compress.blockwise.output_curvature import Gradients
from compress.blockwise.reconstruct import Moving, Tuning, floats, tune
from compress.blockwise.runner import Block, Changed
from compress.blockwise.solve import solve_block
from compress.checkpoint.open import Codes
from compress.solvers.gptq import corrected, gptq, ordered_factor
from compress.solvers.hessian import damped
from compress.solvers.quant_format import Scales, code_values, fit, scaled, to_codes, weights
from compress.solvers.quantease import refine
from compress.solvers.yaqa import coupled_error, gptq_coupled, refine_coupled, shrunk
from compress.spec.formats import FIXED_GROUPS, Grid

#: Of descent on codes and scales.
_ROUNDS = 3


@dataclass(frozen=True)
class Casting:
    """How to cast blocks.

    Attributes:
        tuning: of each block afterwards; None for none. grids: of every tensor to cast.
        dtypes: that scales are stored in, by tensor. refine: after GPTQ fit codes and scales by turns; and in a sweep with
            targets, before it make up for what earlier changes did to the inputs. gradients: where they were measured,
            at last fit them in view of what errors of different outputs do to the prediction together.
    """

    tuning: Tuning | None
    grids: Mapping[str, Grid]
    dtypes: Mapping[str, torch.dtype]
    refine: bool = True
    gradients: Gradients | None = None


class Rounded:
    """A site's weights as codes and scales; tuning moves the scales."""

    def __init__(self, site: Site, grid: Grid, codes: torch.Tensor, scales: Scales, keep: torch.Tensor | None) -> None:
        self.site, self.grid, self.keep = site, grid, keep
        self.scale, self.zero, self.overall = scales.scale, scales.zero, scales.overall
        #: Less zero points, [O, G, S].
        self.codes = codes.view(len(codes), self.scale.shape[1], -1)

    def values(self) -> torch.Tensor:
        """The rounded weights [O, I]."""
        return (self.codes * self.scale[..., None]).view(len(self.codes), -1)

    def project(self) -> None:
        """Put the rounded weights into the block."""
        self.site.weight.copy_(self.values())

    def collect(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Gradients of scales from those of the weights."""
        whole, weight = parameters[self.site.parameter], self.site.weight
        assert whole.grad is not None
        assert whole.is_contiguous()
        start = weight.storage_offset() - whole.storage_offset()
        gradient = whole.grad.contiguous().as_strided(weight.shape, weight.stride(), start)
        self.scale.grad = (gradient.reshape(self.codes.shape) * self.codes).sum(2)

    def finish(self, dtype: torch.dtype) -> Codes:
        """Codes, with scales in the dtype they are stored in; the block gets the weights that a loader will see."""
        scales = Scales(self.scale, self.zero, self.overall)
        codes = to_codes(self.values(), self.grid, scales, dtype, self.keep)
        self.site.weight.copy_(weights(codes, self.keep).to(self.site.weight.dtype))
        return codes


def cast_block(block: Block, how: Casting) -> dict[str, Changed]:
    """Cast the sites of a block in place; codes by tensor name.

    In a sweep with targets, if ``how.refine``, each matrix is matched to what the original gives on its own inputs, and those
    that write to the residual stream also make up for what is wrong in it.

    ``block.details`` gets a row for each matrix (relative output error, seconds) and, where it was tuned, the block's error
    before and after.
    """

    curvature = {} if how.gradients is None else how.gradients.by_outputs(block)

    def solve(
        site: Site, statistics: Statistics, drift: Drift | None, shared: dict[str, Any]
    ) -> tuple[Rounded, dict[str, Any]]:
        keep, grid = block.earlier_mask(site), how.grids[site.name]
        outputs = curvature.pop(site.name, None)
        codes, scales, row = _solve(site, statistics, drift, grid, keep, how.refine, shared, outputs)
        return Rounded(site, grid, codes, scales, keep), {"format": grid.format, **row}

    def blank(site: Site) -> Rounded:
        keep, grid, weight = block.earlier_mask(site), how.grids[site.name], site.weight.float().contiguous()
        return Rounded(site, grid, torch.empty_like(weight), fit(weight, grid, None, keep, search=False), keep)

    rounded = solve_block(
        block,
        statistics_of(block) if how.refine else unpaired_statistics(block),
        solve,
        blank=blank,
        tensors=lambda made: [t for t in (made.codes, made.scale, made.zero, made.overall) if t is not None],
        place=lambda site, made: made.project(),
    )
    if how.tuning is not None and how.tuning.epochs:
        parameters = dict(block.module.named_parameters())
        coded = {id(parameters[s.parameter]) for s in block.sites}
        free_scales = [
            r
            for r in rounded.values()
            if r.grid.format not in FIXED_GROUPS and id(parameters[r.site.parameter]) not in block.frozen
        ]
        moving = [Moving(r.scale, float(r.scale.abs().mean())) for r in free_scales]
        moving += floats(block, coded)

        def project() -> None:
            for r in free_scales:
                r.project()

        def collect() -> None:
            for r in free_scales:
                r.collect(parameters)

        block.details["tuning"] = tune(block, how.tuning, moving, project, collect)
    result = {}
    for name, r in rounded.items():
        mask = None if r.keep is None else (r.keep.T if r.site.transposed else r.keep).contiguous()
        result[name] = Changed(mask, r.finish(how.dtypes[name]))
    return result


def _solve(
    site: Site,
    statistics: Statistics,
    drift: Drift | None,
    grid: Grid,
    keep: torch.Tensor | None,
    refined: bool,
    shared: dict[str, Any],
    F: torch.Tensor | None,
) -> tuple[torch.Tensor, Scales, dict[str, Any]]:
    """Values of codes less zero points [O, I], scales, and what is worth saying.

    Args:
        shared: of sites with the same inputs. F: curvature by outputs [O, O]; None where there is none.
    """
    weight = site.weight.float().contiguous()
    if statistics.tokens == 0:
        scales = fit(weight, grid, None, keep)
        note = "no token reached it: rounded to nearest"
        return code_values(weight, grid, scales, keep), scales, {"error": None, "note": note}
    H = statistics.hessian
    if "order" not in shared:
        shared["order"], factor, shared["damping"] = ordered_factor(H)
        shared["whole"], shared["factor"] = factor, factor.float()
        shared["damped"] = damped(H, min(shared["damping"], 1.0))[0].float()
    order = shared["order"]
    if drift is not None:
        weight = corrected(weight, drift.inputs, drift.residual.get(site.name), shared["whole"], order)
    scales = fit(weight, grid, H.diagonal(), keep)
    latent = gptq(weight, shared["factor"], order, grid, scales, keep)
    codes, scales = refine(weight, latent, shared["damped"], grid, scales, keep, _ROUNDS if refined else 0)
    if F is not None:
        codes, scales = _coupled(weight, codes, shared, shrunk(F), grid, scales, keep)
    row: dict[str, Any] = {"error": statistics.relative_error(weight, scaled(codes, scales.scale))}
    if shared["damping"] != 0.01:
        row["damping"] = shared["damping"]
    return codes, scales, row


def _coupled(
    weight: torch.Tensor,
    codes: torch.Tensor,
    shared: dict[str, Any],
    F: torch.Tensor,
    grid: Grid,
    scales: Scales,
    keep: torch.Tensor | None,
) -> tuple[torch.Tensor, Scales]:
    """Codes and scales refined in view of both curvatures: from those given, or anew from their scales, whichever is nearer."""
    H = shared["damped"]
    anew = gptq_coupled(weight, shared["factor"], shared["order"], F, grid, scales, keep)
    if coupled_error(weight, anew, scales, H, F) < coupled_error(weight, codes, scales, H, F):
        codes = anew
    return refine_coupled(weight, codes, H, F, grid, scales, keep)
