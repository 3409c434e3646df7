"""Codes and scales of one matrix of a block: GPTQ ▶ QuantEase ▶ YAQA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from compress.blockwise.correction import InputMismatch, corrected
from compress.blockwise.hessians import InputStatistics
from compress.blockwise.linears import TargetLinear
from compress.solvers.gptq import act_order_factor, gptq, gptq_batch
from compress.solvers.hessian import damped, damped_diagonal
from compress.solvers.memory import parts_of
from compress.solvers.quant_format import Scales, fit, integer_codes, scaled
from compress.solvers.quantease import quantease
from compress.solvers.yaqa import gptq_kronecker, kronecker_error, refitted, shrunk, yaqa
from compress.spec.formats import QuantFormat

#: Rounds of QuantEase on codes and scales.
_ROUNDS = 3
#: Weights up to which matrices with the same inputs go through GPTQ together, on a CPU and on a GPU.
_TOGETHER = (1 << 22, 1 << 25)
#: The same for experts: weights of a group up to which several groups go together, and of all their weights and factors.
_EXPERTS = ((1 << 17, 1 << 20), (1 << 25, 1 << 26))


class Case(NamedTuple):
    """A matrix to round.

    Attributes:
        keep: keep-mask [O, I] of an earlier pass; None for all weights.
        overall: the scale of nvfp4's scales; None for that of the matrix alone, and for other formats.
    """

    linear: TargetLinear
    quant_format: QuantFormat
    keep: torch.Tensor | None
    overall: torch.Tensor | None


class _Compensated(NamedTuple):
    """A matrix after GPTQ: the weights [O, I] to come near to, the compensated ones, and scales; float32."""

    weight: torch.Tensor
    updated: torch.Tensor
    scales: Scales


#: Weights [O, I] to come near to, scales, and keep-mask of several matrices, all outputs in a row.
_Stacked = tuple[torch.Tensor, Scales, torch.Tensor | None]


class CaseGroup(NamedTuple):
    """Matrices with the same inputs, what was measured of these, and results for `solve_matrix`, which are computed once."""

    cases: Sequence[Case]
    statistics: InputStatistics
    mismatch: InputMismatch | None
    shared: dict[str, Any]


def experts_together(linears: Sequence[TargetLinear]) -> int:
    """How many experts with these matrices go through GPTQ together; larger ones fill a processor each."""
    inputs, outputs = linears[0].weight.shape[1], sum(len(linear.weight) for linear in linears)
    most, in_all = _EXPERTS[linears[0].weight.device.type == "cuda"]
    return max(1, in_all // (inputs * (inputs + outputs))) if inputs * outputs <= most else 1


def compensate_together(groups: Sequence[CaseGroup]) -> None:
    """GPTQ of matrices with the same inputs as of one matrix with all their outputs, and of several such groups at once.

    Outputs do not depend on one another, and a step of GPTQ on a small matrix takes less time than its calls. Left to
    `solve_matrix` are larger matrices, different formats, matrices of which some have a keep-mask, and experts without tokens.
    """
    alike = [group for group in groups if _fit_together(group, alone=len(groups) > 1)]
    if not alike or len({(group.cases[0].quant_format, group.cases[0].keep is None) for group in alike}) > 1:
        return
    targets = [[_target(case, *group[1:]) for case in group.cases] for group in alike]
    stacked = [_stacked(group, own) for group, own in zip(alike, targets, strict=True)]
    if len(alike) == 1:
        shared, (weight, scales, keep) = alike[0].shared, stacked[0]
        updated = [gptq(weight, shared["factor"], shared["order"], alike[0].cases[0].quant_format, scales, keep)]
    else:
        updated = list(_gptq_of_groups(alike, stacked))
    del stacked
    for group, own, new in zip(alike, targets, updated, strict=True):
        parts = torch.split(new, [len(weight) for weight, _ in own])
        group.shared["compensated"] = {
            case.linear.name: _Compensated(weight, part, scale)
            for case, (weight, scale), part in zip(group.cases, own, parts, strict=True)
        }


def _fit_together(group: CaseGroup, *, alone: bool) -> bool:
    """Whether the matrices of a group may be taken together; ``alone``: a group of one matrix too."""
    quant_formats = {case.quant_format for case in group.cases}
    masks = sum(case.keep is not None for case in group.cases)
    if len(quant_formats) != 1 or masks not in (0, len(group.cases)) or not group.statistics.tokens:
        return False
    weights = [case.linear.weight for case in group.cases]
    small = sum(weight.numel() for weight in weights) <= _TOGETHER[weights[0].device.type == "cuda"]
    return small and len(weights) > 1 - alone and not quant_formats.pop().is_trellis


def _stacked(group: CaseGroup, targets: Sequence[tuple[torch.Tensor, Scales]]) -> _Stacked:
    """The targets of a group's matrices, their scales and keep-masks, all outputs in a row."""
    weights, scales = zip(*targets, strict=True)
    zeros = [scale.zero for scale in scales if scale.zero is not None]
    masks = [case.keep for case in group.cases if case.keep is not None]
    together = Scales(torch.cat([scale.scale for scale in scales]), torch.cat(zeros) if zeros else None)
    return torch.cat(weights), together, torch.cat(masks) if masks else None


def _gptq_of_groups(groups: Sequence[CaseGroup], stacked: Sequence[_Stacked]) -> torch.Tensor:
    """Compensated weights of groups with the same shapes [E, O, I]."""
    weights, scales, masks = zip(*stacked, strict=True)
    zeros = [scale.zero for scale in scales if scale.zero is not None]
    return gptq_batch(
        torch.stack(weights),
        torch.stack([group.shared["factor"] for group in groups]),
        torch.stack([group.shared["order"] for group in groups]),
        groups[0].cases[0].quant_format,
        Scales(torch.stack([scale.scale for scale in scales]), torch.stack(zeros) if zeros else None),
        None if masks[0] is None else torch.stack(masks),
    )


def _target(
    case: Case, statistics: InputStatistics, mismatch: InputMismatch | None, shared: dict[str, Any]
) -> tuple[torch.Tensor, Scales]:
    """The weights [O, I] that a matrix should come near to, float32, and its scales."""
    weight, H = case.linear.weight.float().contiguous(), statistics.hessian
    if mismatch is not None:
        weight = corrected(case.linear, weight, H, mismatch, shared)
    if "order" not in shared:
        shared["order"], factor, shared["damping"] = act_order_factor(H)
        shared["factor"] = factor.float()
    return weight, fit(weight, case.quant_format, H.diagonal(), case.keep, case.overall)


def solve_matrix(
    case: Case,
    statistics: InputStatistics,
    mismatch: InputMismatch | None,
    alternating: bool,
    shared: dict[str, Any],
    F: torch.Tensor | None,
) -> tuple[torch.Tensor, Scales, dict[str, Any]]:
    """Codes less zero points [O, I], scales, and the row for the report.

    Args:
        shared: results for linears with the same inputs, which are computed once.
        F: output curvature [O, O]; None without one.
    """
    linear, quant_format, keep, overall = case
    if statistics.tokens == 0:
        weight = linear.weight.float().contiguous()
        scales = fit(weight, quant_format, None, keep, overall)
        note = "no token reached it: rounded to nearest"
        codes = compact(integer_codes(weight, quant_format, scales, keep), quant_format)
        return codes, scales, {"error": None, "note": note}
    if linear.name in shared.get("compensated", ()):
        weight, updated_weights, scales = shared["compensated"].pop(linear.name)
    else:
        weight, scales = _target(case, statistics, mismatch, shared)
        updated_weights = gptq(weight, shared["factor"], shared["order"], quant_format, scales, keep)
    with _damping(statistics.hessian, shared) as damped_H:
        rounds = _ROUNDS if alternating else 0
        codes, scales = _alternated(weight, updated_weights, damped_H, quant_format, scales, keep, rounds)
        del updated_weights
        if F is not None:
            codes, scales = _coupled(
                weight, codes, damped_H, shared, shrunk(F), quant_format, scales, keep, alternating
            )
    row = statistics.error_row(weight, scaled(codes, scales.scale), linear.outputs is not None)
    if shared["damping"] != 0.01:
        row["damping"] = shared["damping"]
    return codes, scales, row


@contextmanager
def _damping(H: torch.Tensor, shared: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Within, H damped, float32; of a float32 H that is H itself."""
    damping = min(shared["damping"], 1.0)
    if H.dtype != torch.float32:
        if "damped" not in shared:
            shared["damped"] = damped(H, damping)[0].float()
        yield shared["damped"]
        return
    diagonal = H.diagonal().clone()
    H.diagonal().copy_(damped_diagonal(H, damping))
    try:
        yield H
    finally:
        H.diagonal().copy_(diagonal)


def compact(codes: torch.Tensor, quant_format: QuantFormat) -> torch.Tensor:
    """Codes less zero points in the smallest dtype that holds them all: int8 for integers below 8 bits, else bfloat16."""
    return codes.to(torch.int8 if quant_format.is_integer and quant_format.bits < 8 else torch.bfloat16)


def _part(scales: Scales, rows: slice) -> Scales:
    return Scales(scales.scale[rows], None if scales.zero is None else scales.zero[rows], scales.overall)


def _alternated(
    weight: torch.Tensor,
    start: torch.Tensor,
    H: torch.Tensor,
    quant_format: QuantFormat,
    scales: Scales,
    keep: torch.Tensor | None,
    rounds: int,
) -> tuple[torch.Tensor, Scales]:
    """`quantease`, some outputs of a large matrix at a time, as they do not depend on one another; compact codes."""
    codes = compact(torch.empty_like(weight, device="meta"), quant_format).new_empty(weight.shape, device=weight.device)
    scale = torch.empty_like(scales.scale)
    for rows in parts_of(weight):
        own = None if keep is None else keep[rows]
        part = quantease(weight[rows], start[rows], H, quant_format, _part(scales, rows), own, rounds)
        codes[rows], scale[rows] = part[0].to(codes.dtype), part[1].scale
    return codes, scales._replace(scale=scale)


def _coupled(
    weight: torch.Tensor,
    codes: torch.Tensor,
    H: torch.Tensor,
    shared: dict[str, Any],
    F: torch.Tensor,
    quant_format: QuantFormat,
    scales: Scales,
    keep: torch.Tensor | None,
    alternating: bool,
) -> tuple[torch.Tensor, Scales]:
    """Codes and scales under both curvatures, from the better of the given codes and those of Kronecker GPTQ.

    These are improved in turns if ``alternating``; else the scales are fitted once.
    Some outputs of a large matrix are refined at a time, while the errors E of the others are fixed. With F_pp the curvature of
    these outputs and F_pq that of these and others, tr(F E H Eᵀ) is least where tr(F_pp E' H E'ᵀ) is, with
    E' = E_p + F_pp⁻¹ F_pq E_q: the same problem with another target.
    """
    for rows in parts_of(weight):
        target, own, F_pp = weight[rows], None if keep is None else keep[rows], F[rows, rows]
        if len(target) < len(weight):
            error = scaled(codes, scales.scale).neg_().add_(weight)
            pull = F[rows] @ error - F_pp @ error[rows]
            del error
            target = target + torch.linalg.solve(F_pp, pull)
        start, part = codes[rows].float(), _part(scales, rows)
        anew = gptq_kronecker(target, shared["factor"], shared["order"], F_pp, quant_format, part, own)
        if kronecker_error(target, anew, part, H, F_pp) < kronecker_error(target, start, part, H, F_pp):
            start = anew
        del anew
        if alternating:
            start, part = yaqa(target, start, H, F_pp, quant_format, part, own)
        else:
            part = refitted(target, start, H, F_pp, quant_format, part)
        codes[rows], scales.scale[rows] = start.to(codes.dtype), part.scale
    return codes, scales
