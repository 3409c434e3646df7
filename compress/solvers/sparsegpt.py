"""SparseGPT (arXiv 2301.00774): remove weights column by column; later columns compensate for the error.

Letters: O outputs, I inputs, B columns of a block, G columns of a smaller block in it. Matrices are held transposed,
[in, out], so that a column of W is contiguous.
"""

from __future__ import annotations

import torch

from compress.solvers.magnitude import keep_largest, keep_n_of_m

#: Columns whose updates are applied to the rest of their block in one product. On a CPU 16 to 128 take the same time.
_INNER = 32


def sparsegpt(
    W_OI: torch.Tensor,
    U_II: torch.Tensor,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    blocksize: int = 128,
    earlier: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pruned weights, [out, in] in W's dtype, and the keep-mask [out, in], True for kept weights.

    Columns are processed from left to right. A weight's score is w² / U_jj², with w as updated so far: what removing it costs
    once later columns compensate. With a sparsity the scores of ``blocksize`` columns are compared, over all outputs; with a
    pattern those of each m columns, within a row. Of equal scores the first in the order [in, out] are kept.

    Give exactly one of ``sparsity`` and ``pattern``.

    Args:
        W_OI: weights, [out, in], any float dtype.
        U_II: upper triangular, Uᵀ U = H⁻¹ (see ``hessian.inverse_factor``), [in, in]; the work is done in its dtype.
        sparsity: round(sparsity · out · in) weights are removed, to the one; the columns before any block's end e have lost
            round(sparsity · out · e).
        pattern: (n, m): n of every m consecutive inputs are kept; m divides in.
        blocksize: columns per choice of the mask and per update of all later columns.
        earlier: a keep-mask. Weights that it removed are zero, stay removed and count towards the sparsity. The rest to remove
            is shared among the blocks of columns in proportion to their remaining weights.

    Raises:
        ValueError: both or none of ``sparsity`` and ``pattern`` are given.
    """
    if (sparsity is None) == (pattern is None):
        raise ValueError("give either sparsity or pattern")
    columns = W_OI.shape[1]
    W_IO = W_OI.t().to(U_II.dtype, memory_format=torch.contiguous_format, copy=True)
    keep_OI = torch.ones_like(W_OI, dtype=torch.bool) if earlier is None else earlier
    keep_IO = keep_OI.t().clone(memory_format=torch.contiguous_format)
    if earlier is not None:
        W_IO *= keep_IO
    variance_I = U_II.diagonal().square()
    alive_I = keep_IO.sum(1).cumsum(0).tolist()
    rate = 0.0 if sparsity is None else _rate(sparsity, W_IO.numel(), alive_I[-1])
    if pattern is not None:
        blocksize = max(blocksize - blocksize % pattern[1], pattern[1])
    alive = removed = 0
    for start in range(0, columns, blocksize):
        stop = min(start + blocksize, columns)
        W_BO, keep_BO = W_IO[start:stop], keep_IO[start:stop]
        # rows divided by their diagonal, so that the error to propagate is the removed weight itself
        U_BI = U_II[start:stop, start:] / U_II.diagonal()[start:stop, None]
        if pattern is None:
            kept = alive_I[stop - 1] - alive - (round(rate * alive_I[stop - 1]) - removed)
            alive, removed = alive_I[stop - 1], round(rate * alive_I[stop - 1])
            score_BO = W_BO.square().div_(variance_I[start:stop, None])
            keep_BO.copy_(keep_largest(score_BO, kept, None if earlier is None else keep_BO))
        error_BO = _remove(W_BO, keep_BO, U_BI, variance_I[start:stop], pattern, earlier is not None)
        if stop < columns:
            W_IO[stop:].addmm_(U_BI[:, stop - start :].T, error_BO, alpha=-1)
        W_BO -= error_BO
    return W_IO.t().to(W_OI.dtype).contiguous(), keep_IO.t().contiguous()


def _rate(sparsity: float, count: int, alive: int) -> float:
    """Return the share of the ``alive`` weights to remove, so that ``sparsity`` of all ``count`` weights is removed."""
    if alive == count:
        return sparsity
    return max(0, round(sparsity * count) - (count - alive)) / alive if alive else 0.0


def _remove(
    W_BO: torch.Tensor,
    keep_BO: torch.Tensor,
    U_BI: torch.Tensor,
    variance_B: torch.Tensor,
    pattern: tuple[int, int] | None,
    masked: bool,
) -> torch.Tensor:
    """Return the removed weights of a block of columns, [B, O], each as updated for those removed before it.

    W_BO is updated in place, but for the removal itself. With a pattern the keep-mask is chosen here, in place, group by group.

    Args:
        keep_BO: the keep-mask; with a pattern the earlier one. U_BI: rows of U over their diagonal. variance_B: U_jj².
        masked: whether there is an earlier keep-mask.
    """
    columns, inner = len(W_BO), _INNER if pattern is None else pattern[1]
    error_BO = torch.empty_like(W_BO)
    for i in range(0, columns, inner):
        j = min(i + inner, columns)
        W_GO, keep_GO, error_GO = W_BO[i:j], keep_BO[i:j], error_BO[i:j]
        if i:
            W_GO.addmm_(U_BI[:i, i:j].T, error_BO[:i], alpha=-1)
        if pattern is not None:
            score_GO = W_GO.square() / variance_B[i:j, None]
            keep_GO.copy_(_keep_group(score_GO, *pattern, keep_GO if masked else None))
        removed_GO = (~keep_GO).to(W_GO.dtype)
        U_GG = U_BI[i:j, i:j]
        for k in range(j - i):
            if k:
                W_GO[k].addmv_(error_GO[:k].T, U_GG[:k, k], alpha=-1)
            torch.mul(W_GO[k], removed_GO[k], out=error_GO[k])
    return error_BO


def _keep_group(score_GO: torch.Tensor, n: int, m: int, earlier_GO: torch.Tensor | None) -> torch.Tensor:
    """Return ``keep_n_of_m`` of one group of m columns, [m, out]; sorts only if scores are equal."""
    threshold_1O = score_GO.kthvalue(m - n + 1, dim=0, keepdim=True).values
    mask_GO = score_GO >= threshold_1O
    if earlier_GO is not None or int(torch.count_nonzero(mask_GO)) != n * score_GO.shape[1]:
        return keep_n_of_m(score_GO, n, m, 0, earlier_GO)
    return mask_GO
