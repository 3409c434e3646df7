"""Codes made better in view of what errors of different outputs do together: the curvature of the loss, Kronecker-factored.

Letters: O outputs, I inputs, B inputs of a block, K outputs whose codes may change. Matrices are held transposed, [in, out], so
that what belongs to one input is contiguous.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.functional import pad

from compress.solvers.hessian import inverse_factor
from compress.solvers.quant_format import Scales, codes_near, scaled
from compress.solvers.quantease import fitted_scales
from compress.spec.formats import FIXED_GROUPS, QuantFormat

#: Inputs whose slopes are brought up to date together.
_BLOCK = 32
#: Inputs and outputs whose errors are handed on one by one, before they are to all others together.
_TILE = 32
#: Of the mean of its diagonal, what is added to that of the curvature at the outputs: it is an estimate from few tokens.
_SHRINKAGE = 0.05


def shrunk(F_OO: torch.Tensor) -> torch.Tensor:
    """A curvature by outputs, scaled in place to a diagonal of mean 1, with a share of the identity added."""
    F_OO /= F_OO.diagonal().mean().clamp(min=torch.finfo(F_OO.dtype).tiny)
    F_OO.diagonal().add_(_SHRINKAGE)
    return F_OO


def yaqa(
    W_OI: torch.Tensor,
    code_OI: torch.Tensor,
    H_II: torch.Tensor,
    F_OO: torch.Tensor,
    quant_format: QuantFormat,
    scales: Scales,
    keep_OI: torch.Tensor | None = None,
    rounds: int = 3,
) -> tuple[torch.Tensor, Scales]:
    """Values of codes less zero points [O, I], and their scales, of a smaller tr(F E H Eᵀ), E being the error W - Q.

    A round goes through the inputs: each output proposes the code that is best for it while all others stand, then the half of
    the proposals that get most in each other's way is dropped until none of the rest would better be dropped too. Then all
    outputs' scales are fitted likewise, each as if the others stood, and moved that way as far as it helps. Neither makes the
    sum larger. Scales of mxfp4 and nvfp4 stay; so do zero points.

    Args:
        W_OI: what is to be matched. code_OI: values to start from. H_II: curvature by inputs, Σ x xᵀ, damped, float32.
        F_OO: by outputs, E[g gᵀ] with g the gradient of the log-likelihood at the outputs, float32, positive definite.
        keep_OI: removed weights stay zero.

    Source: the objective is that of YAQA (arXiv 2505.22988), after K-FAC (arXiv 1503.05671).
    """
    size = quant_format.group or W_OI.shape[1]
    W_IO, code_IO = W_OI.t().contiguous(), code_OI.t().clone(memory_format=torch.contiguous_format)
    scale_GO = scales.scale.t().contiguous()
    zero_GO = None if scales.zero is None else scales.zero.t().contiguous()
    keep_IO = None if keep_OI is None else keep_OI.t().contiguous()
    for _ in range(rounds):
        value_IO = code_IO * scale_GO.repeat_interleave(size, 0)
        _improve_codes(W_IO, code_IO, value_IO, H_II, F_OO, quant_format, scale_GO, zero_GO, keep_IO)
        if quant_format.format not in FIXED_GROUPS:
            scale_GO = _moved_scales(W_IO, code_IO, value_IO, H_II, F_OO, scale_GO)
    return code_IO.t().contiguous(), scales._replace(scale=scale_GO.t().contiguous())


def _improve_codes(
    W_IO: torch.Tensor,
    code_IO: torch.Tensor,
    value_IO: torch.Tensor,
    H_II: torch.Tensor,
    F_OO: torch.Tensor,
    quant_format: QuantFormat,
    scale_GO: torch.Tensor,
    zero_GO: torch.Tensor | None,
    keep_IO: torch.Tensor | None,
) -> None:
    """One time through the inputs; codes and the values they stand for change in place."""
    inputs, size = len(W_IO), len(W_IO) // len(scale_GO)
    coupled_IO = (W_IO - value_IO) @ F_OO
    by_output, by_input = F_OO.diagonal(), H_II.diagonal().tolist()
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        slope_BO = H_II[start:stop] @ coupled_IO
        for i in range(start, stop):
            g, h, slope = i // size, by_input[i], slope_BO[i - start]
            wanted = torch.addcdiv(value_IO[i], slope, by_output, value=1 / h)
            found = codes_near(wanted, scale_GO[g], None if zero_GO is None else zero_GO[g], quant_format)
            if keep_IO is not None:
                found.masked_fill_(~keep_IO[i], 0)
            at = (found != code_IO[i]).nonzero()[:, 0]
            step = (found[at] - code_IO[i, at]) * scale_GO[g, at]
            at, step = _compatible(at, step, slope, h, F_OO)
            if not len(at):
                continue
            coupled = step @ F_OO[at]
            slope_BO.addr_(H_II[start:stop, i], coupled, alpha=-1)
            coupled_IO[i] -= coupled
            code_IO[i, at] = found[at]
            value_IO[i, at] = found[at] * scale_GO[g, at]


def _moved_scales(
    W_IO: torch.Tensor,
    code_IO: torch.Tensor,
    value_IO: torch.Tensor,
    H_II: torch.Tensor,
    F_OO: torch.Tensor,
    scale_GO: torch.Tensor,
) -> torch.Tensor:
    """Scales [G, O] of a smaller sum for these codes; those that there are, where none is found."""
    error_IO = W_IO - value_IO
    # each output is to make up for the errors of the others
    others_IO = error_IO @ F_OO / F_OO.diagonal() - error_IO
    change_GO = fitted_scales(W_IO + others_IO, code_IO, H_II, scale_GO) - scale_GO
    moved_IO = code_IO * change_GO.repeat_interleave(len(W_IO) // len(scale_GO), 0)
    swept_IO = (H_II @ moved_IO) @ F_OO
    # the sum along that way is a parabola
    down, bend = float((swept_IO * error_IO).sum()), float((swept_IO * moved_IO).sum())
    share = max(0.0, min(1.0, down / bend)) if bend > 0 else 0.0
    return scale_GO + share * change_GO


def _compatible(
    at_K: torch.Tensor, step_K: torch.Tensor, slope_O: torch.Tensor, h: float, F_OO: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of proposed steps of one input those that, taken together, each make the error smaller."""
    if not len(at_K):
        return at_K, step_K
    F_KK = F_OO[at_K].index_select(1, at_K).mul_(2 * h)
    alone_K, slope_K = F_KK.diagonal() / 2, 2 * slope_O[at_K]
    left_K = step_K
    while True:
        # what leaving one out would save
        saved_K = torch.addcmul(F_KK @ left_K, alone_K, left_K, value=-1).sub_(slope_K).mul_(left_K)
        worse = int((saved_K > 0).sum())
        if not worse:
            break
        left_K = left_K.masked_fill(saved_K >= saved_K.topk((worse + 1) // 2).values[-1], 0)
    chosen = left_K != 0
    return at_K[chosen], step_K[chosen]


def gptq_kronecker(
    W_OI: torch.Tensor,
    U_II: torch.Tensor,
    order_I: torch.Tensor,
    F_OO: torch.Tensor,
    quant_format: QuantFormat,
    scales: Scales,
    keep_OI: torch.Tensor | None = None,
) -> torch.Tensor:
    """Values of codes less zero points [O, I]: each weight is rounded in view of the errors of those before it.

    GPTQ for tr(F E H Eᵀ) instead of tr(E H Eᵀ): outputs have an order too, by falling curvature. A weight can be rounded as
    soon as those before it both ways are, so all on a diagonal are at once: of tiles, and of weights in these.

    Args:
        U_II: upper triangular, Uᵀ U = H⁻¹ with rows and columns in ``order_I``. Others are those of `yaqa`.

    Source: the feedback is that of YAQA (arXiv 2505.22988), for scalars.
    """
    outputs, inputs = W_OI.shape
    size = quant_format.group or inputs
    order_O = torch.argsort(F_OO.diagonal(), descending=True, stable=True)
    V_OO, _ = inverse_factor(F_OO[order_O][:, order_O], 1e-6)
    # feedback of errors: from inputs before an input, and from outputs before an output
    before_II = (U_II / U_II.diagonal()[:, None]).triu_(1)
    V_OO = V_OO / V_OO.diagonal()[:, None]
    before_OO = torch.linalg.solve_triangular(V_OO, torch.eye(outputs).to(V_OO), upper=True, unitriangular=True)
    before_OO = before_OO.neg_().triu_(1)

    def ordered(t_IO: torch.Tensor) -> torch.Tensor:
        return t_IO.index_select(1, order_O)

    W_IO = ordered(W_OI.t().index_select(0, order_I))
    scale_IO = ordered(scales.scale.t().index_select(0, order_I // size))
    zero_IO = None if scales.zero is None else ordered(scales.zero.t().index_select(0, order_I // size))
    keep_IO = None if keep_OI is None else ordered(keep_OI.t().index_select(0, order_I))
    error_IO, code_IO = torch.empty_like(W_IO), torch.empty_like(W_IO)
    rows, columns = range(0, inputs, _TILE), range(0, outputs, _TILE)
    for number in range(len(rows) + len(columns) - 1):
        tiles = [(i, columns[number - r]) for r, i in enumerate(rows) if 0 <= number - r < len(columns)]
        places = [(slice(i, i + _TILE), slice(o, o + _TILE)) for i, o in tiles]

        def stack(parts: Iterable[torch.Tensor], fill: float = 0.0) -> torch.Tensor:
            """The tiles on this diagonal [N, B, B], those at the edges filled up; outputs backwards, see below."""
            whole = [pad(p, (0, _TILE - p.shape[1], 0, _TILE - p.shape[0]), value=fill) for p in parts]
            return torch.stack(whole).flip(2)

        target = stack(W_IO[b, c] - before_II[: b.start, b].T @ error_IO[: b.start, c] for b, c in places)
        fed = stack(error_IO[b, : c.start] @ before_OO[: c.start, c] for b, c in places)
        by_input = stack(before_II[b, b] for b, _ in places).flip(2).mT
        by_output = stack(before_OO[c, c] for _, c in places).flip(1)
        scale = stack((scale_IO[p] for p in places), 1.0)
        zero = None if zero_IO is None else stack(zero_IO[p] for p in places)
        gone = None if keep_IO is None else ~stack(keep_IO[p] for p in places)
        code = torch.zeros_like(target)
        for t in range(2 * _TILE - 1):
            # outputs run backwards, so weights whose places add up to t are a diagonal, and their rows and columns slices
            at = _TILE - 1 - t
            i = slice(max(0, -at), min(t, _TILE - 1) + 1)
            o = slice(i.start + at, i.stop + at)
            whole, step = target.diagonal(at, 1, 2), scale.diagonal(at, 1, 2)
            found = codes_near(
                whole - fed.diagonal(at, 1, 2), step, None if zero is None else zero.diagonal(at, 1, 2), quant_format
            )
            if gone is not None:
                found.masked_fill_(gone.diagonal(at, 1, 2), 0)
            code.diagonal(at, 1, 2).copy_(found)
            error = torch.addcmul(whole, found, step, value=-1)
            whole.copy_(error)
            target[:, :, o].addcmul_(by_input[:, :, i], error[:, None], value=-1)
            fed[:, i].addcmul_(error[:, :, None], by_output[:, o])
        target, code = target.flip(2), code.flip(2)
        for n, p in enumerate(places):
            shape = error_IO[p].shape
            error_IO[p], code_IO[p] = target[n, : shape[0], : shape[1]], code[n, : shape[0], : shape[1]]
    result = torch.empty_like(code_IO)
    result[order_I[:, None], order_O] = code_IO
    return result.t().contiguous()


def kronecker_error(
    W_OI: torch.Tensor, code_OI: torch.Tensor, scales: Scales, H_II: torch.Tensor, F_OO: torch.Tensor
) -> float:
    """tr(F E H Eᵀ) of codes less zero points."""
    error = W_OI - scaled(code_OI, scales.scale)
    return float(((F_OO @ error) * (error @ H_II)).sum())
