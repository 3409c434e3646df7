"""Wanda (arXiv 2306.11695): weights scored by magnitude times input norm, compared within each output.

Letters: O outputs, I inputs. Masks are bool, True where a weight is kept.
"""

from __future__ import annotations

import torch

from compress.solvers.magnitude import keep_n_of_m


def keep_wanda(
    W_OI: torch.Tensor,
    diag_I: torch.Tensor,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    earlier: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the keep-mask [out, in] by the score |W_ij| · sqrt(H_jj). Of equal scores in a row the first are kept.

    Give exactly one of ``sparsity`` and ``pattern``.

    Args:
        W_OI: weights, [out, in], any float dtype; scores are computed in float32.
        diag_I: diagonal of the sum of x xᵀ, [in].
        sparsity: every row keeps in - round(sparsity · in) weights.
        pattern: (n, m): the n largest of every m consecutive inputs are kept; m divides in.
        earlier: a keep-mask. Weights that it removed stay removed and count as removed. A row in which it keeps fewer weights
            than asked for does not change.

    Raises:
        ValueError: both or none of ``sparsity`` and ``pattern`` are given.
    """
    if (sparsity is None) == (pattern is None):
        raise ValueError("give either sparsity or pattern")
    score_OI = W_OI.abs().float() * diag_I.float().sqrt()
    if pattern is not None:
        return keep_n_of_m(score_OI, *pattern, earlier=earlier)
    assert sparsity is not None
    columns = W_OI.shape[1]
    kept = columns - round(sparsity * columns)
    if kept == 0:
        return torch.zeros_like(W_OI, dtype=torch.bool)
    if earlier is not None:
        score_OI.masked_fill_(~earlier, -1)
    threshold_O1 = score_OI.kthvalue(columns - kept + 1, dim=1, keepdim=True).values
    mask_OI = score_OI >= threshold_O1
    tied_R = torch.nonzero(mask_OI.sum(1) > kept).flatten()  # rows with several weights at the threshold
    if tied_R.numel():
        above_RI = score_OI[tied_R] > threshold_O1[tied_R]
        level_RI = mask_OI[tied_R] & ~above_RI
        mask_OI[tied_R] = above_RI | (level_RI & (level_RI.cumsum(1) <= kept - above_RI.sum(1, keepdim=True)))
    return mask_OI if earlier is None else mask_OI & earlier
