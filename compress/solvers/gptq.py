"""GPTQ (arXiv 2210.17323): quantise weights column by column; the columns not yet quantised compensate for the error.

Letters: E matrices, O outputs, P outputs of a part, I inputs, B columns of a block, G columns of a smaller block in it (in
`gptq_batch`: groups of inputs). Matrices are held transposed, [in, out], so that a column of W is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from compress.solvers.codebook import borders_of
from compress.solvers.hessian import check_finite, damped, inverse_factor
from compress.solvers.memory import parts_of
from compress.solvers.quant_format import Scales, nearest
from compress.spec.formats import QuantFormat

#: Weights [O] of one input, and the index of that input ▶ the values they are rounded to, in a new tensor.
RoundColumn: TypeAlias = Callable[[torch.Tensor, int], torch.Tensor]
#: Columns whose updates are applied to the rest of their block in one product.
_INNER = 32


def act_order(H_II: torch.Tensor) -> torch.Tensor:
    """Return the input indices [I] by falling diagonal of H (act-order).

    The most important inputs are quantised first, while many columns are left to compensate.
    """
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
    """Return the compensated weights, [out, in] in W's dtype. Rounding them gives the quantised weights.

    Scales belong to the groups of inputs in the file's order and are fixed beforehand (static groups), whatever ``order_I``
    is. So no index tensor is stored.

    Args:
        quant_format, scales: the format, and scales [O, G] with optional zero points.
        W_OI, U_II, order_I, keep_OI, blocksize: as in `compensated`.
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


def gptq_batch(
    W_EOI: torch.Tensor,
    U_EII: torch.Tensor,
    order_EI: torch.Tensor,
    quant_format: QuantFormat,
    scales: Scales,
    keep_EOI: torch.Tensor | None = None,
    blocksize: int = 128,
) -> torch.Tensor:
    """Return what `gptq` returns for each of E matrices with inputs of their own, such as experts, [E, out, in].

    A step of the loop over columns rounds a column of every matrix, so that small ones do not wait for E times as many calls.

    Args:
        scales: scales [E, O, G] with optional zero points.
        W_EOI, U_EII, order_EI, keep_EOI, quant_format, blocksize: as in `gptq`, one after another.
    """
    count, outputs, inputs = W_EOI.shape

    def of_columns(values_ECO: torch.Tensor, columns_EB: torch.Tensor) -> torch.Tensor:
        return values_ECO.gather(1, columns_EB[:, :, None].expand(-1, -1, outputs))

    W_EIO = of_columns(W_EOI.mT, order_EI).to(U_EII.dtype)
    updated_EIO = torch.empty_like(W_EIO)
    group_EI = order_EI // (quant_format.group or inputs)
    for start in range(0, inputs, blocksize):
        stop = min(start + blocksize, inputs)
        W_EBO, group_EB = W_EIO[:, start:stop], group_EI[:, start:stop]
        scale_EBO = of_columns(scales.scale.mT.to(U_EII.dtype), group_EB)
        zero_EBO = None if scales.zero is None else of_columns(scales.zero.mT.to(U_EII.dtype), group_EB)
        keep_EBO = None if keep_EOI is None else of_columns(keep_EOI.mT, order_EI[:, start:stop])
        U_EBI = U_EII[:, start:stop, start:] / U_EII.diagonal(dim1=1, dim2=2)[:, start:stop, None]
        error_EBO = torch.empty_like(W_EBO)
        for i in range(0, stop - start, _INNER):
            j = min(i + _INNER, stop - start)
            if i:
                W_EBO[:, i:j].baddbmm_(U_EBI[:, :i, i:j].mT, error_EBO[:, :i], alpha=-1)
            for k in range(i, j):
                w_EO, scale_EO = W_EBO[:, k], scale_EBO[:, k]
                if k > i:
                    W_EBO[:, k : k + 1].baddbmm_(U_EBI[:, i:k, k : k + 1].mT, error_EBO[:, i:k], alpha=-1)
                if zero_EBO is None:
                    rounded_EO = nearest(w_EO / scale_EO, quant_format)
                else:
                    zero_EO = zero_EBO[:, k]
                    rounded_EO = nearest(torch.addcdiv(zero_EO, w_EO, scale_EO), quant_format).sub_(zero_EO)
                rounded_EO.mul_(scale_EO)
                if keep_EBO is not None:
                    rounded_EO.mul_(keep_EBO[:, k])
                torch.sub(w_EO, rounded_EO, out=error_EBO[:, k])
        updated_EIO[:, start:stop] = W_EBO
        if stop < inputs:
            W_EIO[:, stop:].baddbmm_(U_EBI[:, :, stop - start :].mT, error_EBO, alpha=-1)
    result_EIO = W_EIO.scatter_(1, order_EI[:, :, None].expand(count, inputs, outputs), updated_EIO)
    return result_EIO.mT.to(W_EOI.dtype).contiguous()


def codebook_gptq(
    W_OI: torch.Tensor,
    U_II: torch.Tensor,
    order_I: torch.Tensor,
    book_K: torch.Tensor,
    keep_OI: torch.Tensor | None = None,
    blocksize: int = 128,
) -> torch.Tensor:
    """Return the compensated weights, as `gptq`, where the values are those of a codebook [K], ascending."""
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
    """Return the compensated weights, [out, in] in W's dtype: each column as it was when ``round_`` was applied to it.

    After column j is rounded to q, every later column k becomes w_k - (w_j - q) U_jk / U_jj.

    Args:
        W_OI: weights, [out, in], any float dtype; the work is done in U's dtype.
        U_II: upper triangular with Uᵀ U = H⁻¹, rows and columns in ``order_I`` (see `hessian.inverse_factor`).
        order_I: the order in which columns are rounded.
        round_: rounds one column.
        keep_OI: keep-mask; removed weights round to zero.
        blocksize: columns whose updates of all later columns are applied in one product.

    Source: GPTQ (arXiv 2210.17323), algorithm 1.
    """
    inputs = W_OI.shape[1]
    W_IO = W_OI.t()[order_I].to(U_II.dtype, memory_format=torch.contiguous_format, copy=True)
    updated_IO = torch.empty_like(W_IO)
    numbers = order_I.tolist()
    removed_IO = None if keep_OI is None else ~keep_OI.t()[order_I]
    for start in range(0, inputs, blocksize):
        stop = min(start + blocksize, inputs)
        W_BO = W_IO[start:stop]
        # rows divided by their diagonal, so that the error to propagate is that of the weight itself
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
                rounded_O = round_(w, numbers[at])
                if removed_IO is not None:
                    rounded_O.masked_fill_(removed_IO[at], 0)
                torch.sub(w, rounded_O, out=error_GO[k])
            updated_IO[start + i : start + j] = W_GO
        if stop < inputs:
            W_IO[stop:].addmm_(U_BI[:, stop - start :].T, error_BO, alpha=-1)
    result_IO = torch.empty_like(W_IO)
    result_IO[order_I] = updated_IO
    return result_IO.t().to(W_OI.dtype).contiguous()  # `to` alone may hand back the transposed view


def ridge_factor(H_II: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the lower triangular L with L Lᵀ = H + λ, [in, in] in H's dtype; λ is ``ridge`` times the mean of H's diagonal.

    The ridge grows tenfold until there is one.

    Raises:
        ValueError: H holds NaN or infinite values.
    """
    check_finite(H_II)
    while True:
        work_II = damped(H_II, ridge)[0].mT  # column-major as LAPACK wants it: a symmetric matrix is its own transpose
        failed = torch.empty((), dtype=torch.int32, device=H_II.device)
        torch.linalg.cholesky_ex(work_II, out=(work_II, failed))
        if not int(failed):
            return work_II
        ridge *= 10


def asymmetric_target(W_OI: torch.Tensor, pull: Callable[[slice], torch.Tensor], L_II: torch.Tensor) -> torch.Tensor:
    """Return V = W + (W Δ + R) (H + λ)⁻¹, [out, in] in W's dtype: W corrected for the error of earlier matrices.

    With x the original's inputs and x̂ the present ones, V minimises Σ ||V x̂ - W x - r||² + λ ||V - W||², where r is what the
    residual stream lacks. Write V = W + D. Then V x̂ - W x - r = D x̂ - (W (x - x̂) + r), and the derivative by D is zero at
    D (H + λ) = Σ (W (x - x̂) + r) x̂ᵀ = W Δ + R.

    Args:
        W_OI: the original's weights, [out, in], any float dtype.
        pull: returns W Δ + R of some outputs, [out, in], in L's dtype; Δ = Σ (x - x̂) x̂ᵀ, R = Σ r x̂ᵀ.
        L_II: lower triangular with L Lᵀ = H + λ, H = Σ x̂ x̂ᵀ; see `ridge_factor`.

    Source: the objective of GPTAQ (arXiv 2504.02692), solved before rounding instead of column by column.
    """
    target_OI = torch.empty_like(W_OI)
    for rows in parts_of(W_OI):  # outputs do not depend on one another
        target_OI[rows] = W_OI[rows] + torch.cholesky_solve(pull(rows).T, L_II).T
    return target_OI


def act_order_factor(H_II: torch.Tensor, damp: float = 0.01) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return (order [I], U [I, I], damping): `act_order` of H, and `inverse_factor` of H in that order."""
    order_I = act_order(H_II)
    U_II, damping = inverse_factor(H_II, damp, order_I)
    return order_I, U_II, damping
