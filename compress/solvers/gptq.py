"""GPTQ: round weights column by column and let the columns to the right make up for each (arXiv 2210.17323).

Letters: O outputs, I inputs, B columns of a block, G of a smaller one in it. Matrices are held transposed, [in, out], so that
a column of W is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from compress.solvers.codebook import borders_of
from compress.solvers.hessian import inverse_factor
from compress.solvers.quant_format import Scales, nearest
from compress.spec.formats import QuantFormat

#: Weights [O] of an input, and its number ▶ the values they are rounded to, a new tensor.
RoundColumn: TypeAlias = Callable[[torch.Tensor, int], torch.Tensor]
#: Columns whose updates are applied to the rest of their block at once.
_INNER = 32


def act_order(H_II: torch.Tensor) -> torch.Tensor:
    """Inputs by falling diagonal of H [I]: those that matter most are rounded first, while others can still make up."""
    return torch.argsort(H_II.diagonal(), descending=True, stable=True)


def gptq(
    W_OI: torch.Tensor,
    U_II: torch.Tensor,
    order_I: torch.Tensor,
    quant_format: QuantFormat,
    scales: Scales,
    keep_OI: torch.Tensor | None = None,
    blocksize: int = 128,
) -> torch.Tensor:
    """The weights to round to nearest, [out, in] in W's dtype: as updated for the errors of the columns before.

    Scales are those of the groups in the file's order, fixed beforehand ("static groups"), whatever the order of work: no
    index tensor is needed. Arguments beside grid and scales are those of `compensated`.
    """
    size = quant_format.group or W_OI.shape[1]
    scale_GO = scales.scale.t().to(U_II.dtype).contiguous()
    zero_GO = None if scales.zero is None else scales.zero.t().to(U_II.dtype).contiguous()

    def round_(w_O: torch.Tensor, i: int) -> torch.Tensor:
        scale_O = scale_GO[i // size]
        if zero_GO is None:
            return nearest(w_O / scale_O, quant_format).mul_(scale_O)
        zero_O = zero_GO[i // size]
        return nearest(torch.addcdiv(zero_O, w_O, scale_O), quant_format).sub_(zero_O).mul_(scale_O)

    return compensated(W_OI, U_II, order_I, round_, keep_OI, blocksize)


def codebook_gptq(
    W_OI: torch.Tensor,
    U_II: torch.Tensor,
    order_I: torch.Tensor,
    book_K: torch.Tensor,
    keep_OI: torch.Tensor | None = None,
    blocksize: int = 128,
) -> torch.Tensor:
    """As `gptq`, for the values of a codebook, ascending. Arguments beside it are those of `compensated`."""
    book_K = book_K.to(W_OI.device, U_II.dtype)
    borders = borders_of(book_K)

    def round_(w_O: torch.Tensor, i: int) -> torch.Tensor:
        return book_K[torch.bucketize(w_O, borders)]

    return compensated(W_OI, U_II, order_I, round_, keep_OI, blocksize)


def compensated(
    W_OI: torch.Tensor,
    U_II: torch.Tensor,
    order_I: torch.Tensor,
    round_: RoundColumn,
    keep_OI: torch.Tensor | None = None,
    blocksize: int = 128,
) -> torch.Tensor:
    """The weights to round, [out, in] in W's dtype: as updated for the errors of the columns before.

    Args:
        W_OI: weights, [out, in]. U_II: upper triangular, Uᵀ U = H⁻¹ with rows and columns in ``order_I``.
        order_I: in which order columns are rounded. keep_OI: removed weights are rounded to zero.
    """
    inputs = W_OI.shape[1]
    W_IO = W_OI.t()[order_I].to(U_II.dtype, memory_format=torch.contiguous_format, copy=True)
    latent_IO = torch.empty_like(W_IO)
    numbers = order_I.tolist()
    gone_IO = None if keep_OI is None else ~keep_OI.t()[order_I]
    for start in range(0, inputs, blocksize):
        stop = min(start + blocksize, inputs)
        W_BO = W_IO[start:stop]
        # rows divided by their diagonal: then the error to hand on is that of the weight itself
        U_BI = U_II[start:stop, start:] / U_II.diagonal()[start:stop, None]
        error_BO = torch.empty_like(W_BO)
        for i in range(0, stop - start, _INNER):
            j = min(i + _INNER, stop - start)
            W_GO, error_GO = W_BO[i:j], error_BO[i:j]
            if i:
                W_GO.addmm_(U_BI[:i, i:j].T, error_BO[:i], alpha=-1)
            U_GG = U_BI[i:j, i:j]
            for k in range(j - i):
                w, at = W_GO[k], start + i + k
                if k:
                    w.addmv_(error_GO[:k].T, U_GG[:k, k], alpha=-1)
                back = round_(w, numbers[at])
                if gone_IO is not None:
                    back.masked_fill_(gone_IO[at], 0)
                torch.sub(w, back, out=error_GO[k])
            latent_IO[start + i : start + j] = W_GO
        if stop < inputs:
            W_IO[stop:].addmm_(U_BI[:, stop - start :].T, error_BO, alpha=-1)
    result_IO = torch.empty_like(W_IO)
    result_IO[order_I] = latent_IO
    return result_IO.t().to(W_OI.dtype).contiguous()  # `to` alone may hand back the transposed view


def asymmetric_target(
    W_OI: torch.Tensor,
    drift_II: torch.Tensor,
    residual_OI: torch.Tensor | None,
    U_II: torch.Tensor,
    order_I: torch.Tensor,
) -> torch.Tensor:
    """The weights whose outputs, on inputs as they have become, are nearest to those of W on the inputs as they were.

    With x̂ and x the inputs now and then, they minimise Σ ||V x̂ - W x - r||² (with H's damping, which holds V near W), r being
    what else the outputs are to make up for.

    Args:
        W_OI: weights, [out, in]. drift_II: Σ (x - x̂) x̂ᵀ. residual_OI: Σ r x̂ᵀ; None for none.
        U_II: upper triangular, Uᵀ U = H⁻¹ with H = Σ x̂ x̂ᵀ in ``order_I``, damped.

    Returns:
        V in W's dtype.

    Source: the target of GPTAQ (arXiv 2504.02692), solved before rounding instead of in its course.
    """
    moved_OI = W_OI.to(drift_II.dtype) @ drift_II
    if residual_OI is not None:
        moved_OI += residual_OI
    change_OI = torch.empty_like(moved_OI)
    change_OI[:, order_I] = (moved_OI[:, order_I] @ U_II.T) @ U_II
    return (W_OI + change_OI).to(W_OI.dtype)


def act_order_factor(H_II: torch.Tensor, damp: float = 0.01) -> tuple[torch.Tensor, torch.Tensor, float]:
    """``inverse_factor`` of H in the order of importance: (order, U, damping)."""
    order_I = act_order(H_II)
    U_II, damping = inverse_factor(H_II[order_I][:, order_I], damp)
    return order_I, U_II, damping
