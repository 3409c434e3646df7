"""YAQA (arXiv 2505.22988): quantise for the curvature of the loss, tr(F E H Eᵀ), Kronecker-factored into outputs and inputs.

Letters: O outputs, I inputs, B inputs of a block, K outputs whose codes may change. Matrices are held transposed, [in, out], so
that the weights of one input are contiguous.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch.nn.functional import pad

from compress.solvers.quant_format import Scales, codes_near, scaled
from compress.solvers.quantease import fitted_scales
from compress.spec.formats import QuantFormat

#: Inputs whose slopes are computed in one product.
_BLOCK = 32
#: Inputs and outputs of a tile: errors propagate one by one within it, and to other tiles in one product.
_TILE = 32
#: Outputs that GPTQ rounds at once. With 1 it takes 2.2 times as many steps for an objective that is 0.4 % lower
#: (docs/decisions/002-output-curvature.md).
_TOGETHER = 8
#: Groups whose feedback is computed at once.
_BAND = 64
#: Damping of the output curvature, in units of its diagonal's mean. It is estimated from few tokens: a real model of 135 M
#: parameters loses a fifth less with 1 than with 0.05, and models of 5 M the same (docs/decisions/002-output-curvature.md).
_SHRINKAGE = 1.0


def shrunk(F_OO: torch.Tensor, damping: float = _SHRINKAGE) -> torch.Tensor:
    """Scale an output curvature [O, O] in place to a diagonal of mean 1, damp it, and return it."""
    F_OO /= F_OO.diagonal().mean().clamp(min=torch.finfo(F_OO.dtype).tiny)
    F_OO.diagonal().add_(damping)
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
    """Return codes less zero points [O, I] and their scales, with tr(F E H Eᵀ) no larger than that of the start; E = W - Q.

    A round visits the inputs. For each input every output proposes the code that is best while all others are fixed. Proposals
    with most conflict are dropped until every remaining one lowers the objective (`_compatible_steps`). Then the scales of
    every output are fitted as if the others were fixed, and all move along that direction as far as it helps (`_scale_step`).
    No step raises the objective. Zero points do not change, nor do the scales of mxfp4 and nvfp4.

    Args:
        W_OI: weights to match, [out, in], float32.
        code_OI: codes less zero points to start from, [out, in], float32.
        H_II: input curvature, sum of x xᵀ, [in, in], damped, float32.
        F_OO: output curvature E[g gᵀ], [out, out], float32, positive definite; g is the gradient of the log-likelihood at the
            outputs.
        quant_format, scales: the format, and scales [O, G] with optional zero points.
        keep_OI: keep-mask; removed weights stay zero.
        rounds: rounds over codes and scales.

    Source: the objective of YAQA (arXiv 2505.22988), after K-FAC (arXiv 1503.05671).
    """
    size = quant_format.group or W_OI.shape[1]
    W_IO, code_IO = W_OI.t().contiguous(), code_OI.t().clone(memory_format=torch.contiguous_format)
    scale_GO = scales.scale.t().contiguous()
    zero_GO = None if scales.zero is None else scales.zero.t().contiguous()
    keep_IO = None if keep_OI is None else keep_OI.t().contiguous()
    value_IO = code_IO * scale_GO.repeat_interleave(size, 0)
    coupled_IO = (W_IO - value_IO) @ F_OO
    for _ in range(rounds):
        _improve_codes(code_IO, value_IO, coupled_IO, H_II, F_OO, quant_format, scale_GO, zero_GO, keep_IO)
        if not quant_format.fixed_scales:
            scale_GO = _scale_step(code_IO, value_IO, coupled_IO, H_II, F_OO, scale_GO)
    return code_IO.t().contiguous(), scales._replace(scale=scale_GO.t().contiguous())


def refitted(
    W_OI: torch.Tensor,
    code_OI: torch.Tensor,
    H_II: torch.Tensor,
    F_OO: torch.Tensor,
    quant_format: QuantFormat,
    scales: Scales,
) -> Scales:
    """Return scales for these codes with tr(F E H Eᵀ) no larger than before: `yaqa` without its steps on codes."""
    if quant_format.fixed_scales:
        return scales
    code_IO, scale_GO = code_OI.t().contiguous(), scales.scale.t().contiguous()
    value_IO = code_IO * scale_GO.repeat_interleave(len(code_IO) // len(scale_GO), 0)
    coupled_IO = (W_OI.t() - value_IO) @ F_OO
    scale_GO = _scale_step(code_IO, value_IO, coupled_IO, H_II, F_OO, scale_GO)
    return scales._replace(scale=scale_GO.t().contiguous())


def _improve_codes(
    code_IO: torch.Tensor,
    value_IO: torch.Tensor,
    coupled_IO: torch.Tensor,
    H_II: torch.Tensor,
    F_OO: torch.Tensor,
    quant_format: QuantFormat,
    scale_GO: torch.Tensor,
    zero_GO: torch.Tensor | None,
    keep_IO: torch.Tensor | None,
) -> None:
    """Visit every input once and improve its codes.

    ``code_IO``, the dequantised weights ``value_IO`` and ``coupled_IO``, their errors times F, change in place.
    """
    inputs, size = len(code_IO), len(code_IO) // len(scale_GO)
    by_output, by_input = F_OO.diagonal(), H_II.diagonal().tolist()
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        slope_BO = H_II[start:stop] @ coupled_IO
        for i in range(start, stop):
            g, h, slope = i // size, by_input[i], slope_BO[i - start]
            optimum = torch.addcdiv(value_IO[i], slope, by_output, value=1 / h)
            proposed = codes_near(optimum, scale_GO[g], None if zero_GO is None else zero_GO[g], quant_format)
            if keep_IO is not None:
                proposed.masked_fill_(~keep_IO[i], 0)
            at = (proposed != code_IO[i]).nonzero()[:, 0]
            step = (proposed[at] - code_IO[i, at]) * scale_GO[g, at]
            at, step = _compatible_steps(at, step, slope, h, F_OO)
            if not len(at):
                continue
            coupled = step @ F_OO[at]
            slope_BO.addr_(H_II[start:stop, i], coupled, alpha=-1)
            coupled_IO[i] -= coupled
            code_IO[i, at] = proposed[at]
            value_IO[i, at] = proposed[at] * scale_GO[g, at]


def _scale_step(
    code_IO: torch.Tensor,
    value_IO: torch.Tensor,
    coupled_IO: torch.Tensor,
    H_II: torch.Tensor,
    F_OO: torch.Tensor,
    scale_GO: torch.Tensor,
) -> torch.Tensor:
    """Return scales [G, O] for these codes with tr(F E H Eᵀ) no larger than with ``scale_GO``.

    While the errors e_p of all other outputs are fixed, output o is best at the target w_o + Σ_p≠o (F_op / F_oo) e_p in the
    norm of H: a least-squares fit. All outputs then change at once, along M [I, O]. The objective along θ M is a parabola with
    its minimum at θ = tr(F E H Mᵀ) / tr(F M H Mᵀ), clipped to [0, 1]. ``value_IO`` and ``coupled_IO``, E F, follow.
    """
    target_IO = torch.addcdiv(value_IO, coupled_IO, F_OO.diagonal())
    change_GO = fitted_scales(target_IO, code_IO, H_II, scale_GO) - scale_GO
    del target_IO
    direction_IO = code_IO * change_GO.repeat_interleave(len(code_IO) // len(scale_GO), 0)
    gradient_IO, direction_of_outputs_IO = H_II @ direction_IO, direction_IO @ F_OO
    # slope and curvature of the objective along the change
    slope, curvature = float((gradient_IO * coupled_IO).sum()), float((gradient_IO * direction_of_outputs_IO).sum())
    share = max(0.0, min(1.0, slope / curvature)) if curvature > 0 else 0.0
    value_IO.add_(direction_IO, alpha=share)
    coupled_IO.sub_(direction_of_outputs_IO, alpha=share)
    return scale_GO + share * change_GO


def _compatible_steps(
    at_K: torch.Tensor, step_K: torch.Tensor, slope_O: torch.Tensor, h: float, F_OO: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the proposed steps of one input, (outputs [K], steps [K]), that each lower the objective when taken together.

    Steps d change the objective by f(d) = -2 dᵀ s + h dᵀ F d. Leaving out step k saves
    2 h d_k (F d)_k - h F_kk d_k² - 2 d_k s_k. The half with the largest positive savings is dropped, repeatedly, until no
    saving is positive. Then f(d) ≤ 0, given that each step alone lowers the objective: d_k s_k ≥ ½ h F_kk d_k², and half the
    sum of the savings is f(d) + dᵀ s - ½ h Σ F_kk d_k².

    Args:
        at_K: outputs that propose a step. step_K: change of their weights. slope_O: s = (F E H) of this input, [O].
        h: H_ii of this input. F_OO: output curvature.
    """
    if not len(at_K):
        return at_K, step_K
    F_KK = F_OO[at_K].index_select(1, at_K).mul_(2 * h)
    alone_K, slope_K = F_KK.diagonal() / 2, 2 * slope_O[at_K]
    active_K = step_K
    while True:
        # saving of leaving out each step
        saved_K = torch.addcmul(F_KK @ active_K, alone_K, active_K, value=-1).sub_(slope_K).mul_(active_K)
        harmful = int((saved_K > 0).sum())
        if not harmful:
            break
        active_K = active_K.masked_fill(saved_K >= saved_K.topk((harmful + 1) // 2).values[-1], 0)
    chosen = active_K != 0
    return at_K[chosen], step_K[chosen]


def gptq_kronecker(
    W_OI: torch.Tensor,
    U_II: torch.Tensor,
    order_I: torch.Tensor,
    F_OO: torch.Tensor,
    quant_format: QuantFormat,
    scales: Scales,
    keep_OI: torch.Tensor | None = None,
    together: int = _TOGETHER,
) -> torch.Tensor:
    """Return codes less zero points [O, I] by GPTQ for tr(F E H Eᵀ) instead of tr(E H Eᵀ).

    Outputs have an order too, by falling curvature, and are cut into groups. With Uᵀ U = H⁻¹ and F = X D Xᵀ, where X is unit
    upper block triangular, the objective is a sum of squares, one for each input and group, which depends on the weights of
    that input and group and on those before them. Each weight is rounded so that its share of the square is least, without
    regard to the others of its group. It can be rounded once those before it are, so a whole antidiagonal of inputs and
    groups is rounded at once: of tiles, and of groups within tiles.

    Args:
        W_OI: weights, [out, in], float32.
        U_II: upper triangular with Uᵀ U = H⁻¹, rows and columns in ``order_I`` (see `hessian.inverse_factor`).
        order_I: the order in which inputs are rounded.
        F_OO, quant_format, scales, keep_OI: as in `yaqa`.
        together: outputs of a group; with 1 every square is that of one weight.

    Source: the feedback of YAQA (arXiv 2505.22988), for scalars.
    """
    outputs, inputs = W_OI.shape
    size = quant_format.group or inputs
    order_O = torch.argsort(F_OO.diagonal(), descending=True, stable=True)
    before_II, before_OO = _feedback(U_II, F_OO[order_O][:, order_O], together)
    ordered = partial(torch.index_select, dim=1, index=order_O)
    W_IO = ordered(W_OI.t().index_select(0, order_I))
    scale_GO, group_I = ordered(scales.scale.t()), order_I // size
    zero_GO = None if scales.zero is None else ordered(scales.zero.t())
    keep_IO = None if keep_OI is None else ordered(keep_OI.t().index_select(0, order_I))
    error_IO, code_IO = torch.empty_like(W_IO), torch.empty_like(W_IO)
    wide = _TILE if together == 1 else 2 * _TILE
    for places in _antidiagonals(inputs, outputs, wide):

        def stack(parts: Iterable[torch.Tensor], fill: float = 0.0) -> torch.Tensor:
            """Return the tiles of this antidiagonal [N, B, G, S], padded at the edges, with groups reversed."""
            return _stacked(parts, _TILE, wide, fill).view(-1, _TILE, wide // together, together).flip(2)

        target = stack(W_IO[b, c] - before_II[: b.start, b].T @ error_IO[: b.start, c] for b, c in places)
        feedback = stack(error_IO[b, : c.start] @ before_OO[: c.start, c] for b, c in places)
        by_input = _stacked((before_II[b, b].T for b, _ in places), _TILE)
        by_output = _stacked((before_OO[c, c] for _, c in places), wide)
        by_output = by_output.view(len(places), -1, together, wide // together, together).flip(1, 3)
        scale = stack((scale_GO[group_I[b], c] for b, c in places), 1.0)
        zero = None if zero_GO is None else stack(zero_GO[group_I[b], c] for b, c in places)
        removed = None if keep_IO is None else ~stack(keep_IO[p] for p in places)
        code = _round_tiles(target, feedback, by_input, by_output, scale, zero, removed, quant_format)
        error, code = (t.flip(2).view(len(places), _TILE, wide) for t in (target, code))
        for n, p in enumerate(places):
            b, c = error_IO[p].shape
            error_IO[p], code_IO[p] = error[n, :b, :c], code[n, :b, :c]
    result = torch.empty_like(code_IO)
    result[order_I[:, None], order_O] = code_IO
    return result.t().contiguous()


def _stacked(parts: Iterable[torch.Tensor], rows: int, columns: int | None = None, fill: float = 0.0) -> torch.Tensor:
    """Return matrices, each padded to [rows, columns], a square by default, in one tensor."""
    columns = columns or rows
    return torch.stack([pad(part, (0, columns - part.shape[1], 0, rows - part.shape[0]), value=fill) for part in parts])


def _antidiagonals(inputs: int, outputs: int, wide: int) -> Iterator[list[tuple[slice, slice]]]:
    """Yield the tiles of each antidiagonal, as slices of inputs and of outputs."""
    rows, columns = range(0, inputs, _TILE), range(0, outputs, wide)
    for number in range(len(rows) + len(columns) - 1):
        tiles = [(i, columns[number - r]) for r, i in enumerate(rows) if 0 <= number - r < len(columns)]
        yield [(slice(i, i + _TILE), slice(o, o + wide)) for i, o in tiles]


def _feedback(U_II: torch.Tensor, F_OO: torch.Tensor, together: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the feedback of errors from earlier inputs [I, I] and from earlier groups of outputs [O, O].

    The first is Ũ - 1, where Ũ is U with rows over their diagonals. The second is 1 - X, where X is an upper triangular factor,
    X Xᵀ = F, times the inverses of its diagonal blocks. Both are strictly upper (block) triangular.
    """
    before_II = (U_II / U_II.diagonal()[:, None]).triu_(1)
    X_OO = torch.linalg.cholesky(F_OO.flip(0, 1)).flip(0, 1)
    outputs = len(X_OO)
    whole = outputs // together * together
    # groups of the whole size, some at a time, then the last one
    bands = [*range(0, whole, _BAND * together), whole, outputs]
    for start, stop in itertools.pairwise(dict.fromkeys(bands)):
        size = min(together, stop - start)
        columns_OGS = X_OO[:, start:stop].view(outputs, -1, size)
        blocks_GSS = columns_OGS[start:stop].view(-1, size, columns_OGS.shape[1], size).diagonal(dim1=0, dim2=2)
        blocks_GSS = blocks_GSS.permute(2, 0, 1).contiguous()
        inverse_GSS = torch.linalg.solve_triangular(blocks_GSS, torch.eye(size).to(X_OO), upper=True)
        columns_OGS.copy_((columns_OGS.transpose(0, 1) @ inverse_GSS).transpose(0, 1))
        for group in range(start, stop, size):
            X_OO[group : group + size, group : group + size] = 0
    return before_II, X_OO.neg_()


def _round_tiles(
    target: torch.Tensor,
    feedback: torch.Tensor,
    by_input: torch.Tensor,
    by_output: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    removed: torch.Tensor | None,
    quant_format: QuantFormat,
) -> torch.Tensor:
    """Return the codes of N independent tiles, [N, B inputs, G groups, S outputs], groups reversed; ``target`` becomes errors.

    An antidiagonal of groups is rounded at once. With groups reversed it is a diagonal, and its rows and columns are slices.

    Args:
        target: weights less the feedback of earlier inputs outside the tile. feedback: that of earlier outputs outside it.
        by_input: feedback within tiles, to and from inputs, [N, B, B]. by_output: from and to outputs, [N, G, S, G, S].
        scale, zero: of each weight. removed: removed weights.
    """
    code = torch.zeros_like(target)
    tiles, inputs, groups, size = target.shape
    by_output = by_output.reshape(tiles, groups, size, groups * size)
    feedback = feedback.reshape(tiles, inputs, 1, groups * size)
    fed = feedback.view(target.shape)
    for t in range(inputs + groups - 1):
        at = groups - 1 - t
        i = slice(max(0, -at), min(inputs, groups - at))
        g = slice(i.start + at, i.stop + at)
        whole, step = target.diagonal(at, 1, 2), scale.diagonal(at, 1, 2)
        zero_point = None if zero is None else zero.diagonal(at, 1, 2)
        rounded = codes_near(whole - fed.diagonal(at, 1, 2), step, zero_point, quant_format)
        if removed is not None:
            rounded.masked_fill_(removed.diagonal(at, 1, 2), 0)
        code.diagonal(at, 1, 2).copy_(rounded)
        error = torch.addcmul(whole, rounded, step, value=-1)
        whole.copy_(error)
        error = error.mT  # [N, groups, S]
        target[:, :, g].addcmul_(by_input[:, :, i, None], error[:, None], value=-1)
        feedback[:, i].add_(error[:, :, None] @ by_output[:, g])
    return code


def kronecker_error(
    W_OI: torch.Tensor, code_OI: torch.Tensor, scales: Scales, H_II: torch.Tensor, F_OO: torch.Tensor
) -> float:
    """Return tr(F E H Eᵀ) of codes less zero points, with E = W - Q."""
    error = W_OI - scaled(code_OI, scales.scale)
    return float(((F_OO @ error) * (error @ H_II)).sum())
