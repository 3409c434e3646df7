"""Low-rank factors of a weight matrix with the least output error.

Letters: O outputs, I inputs, R ranks. With H = Σ x xᵀ the error ||(W - V)X||² is tr((W - V) H (W - V)ᵀ).
"""

from __future__ import annotations

import torch

from compress.solvers.hessian import inverse_factor

#: Columns of H that are in float64 at a time.
_COLUMNS = 2048


def low_rank(
    W_OI: torch.Tensor, H_II: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Return the factors A B of that rank with the least ||(W - A B)X||².

    With H = L Lᵀ the error is ||W L - A B L||², least at the truncated SVD of W L (Eckart and Young). Its left singular vectors
    are the eigenvectors P of W H Wᵀ, so A B = P Pᵀ W, and no factor of H is needed. If there are more outputs than inputs, the
    smaller problem of the right singular vectors is solved. The work is in float64.

    Args:
        W_OI: weights, [out, in], any float dtype.
        H_II: sum of x xᵀ, symmetric, [in, in], float32 or float64.
        rank: at most min(out, in).

    Returns:
        A [out, rank] and B [rank, in] in W's dtype, with equal norms for each rank; the eigenvalues λ [min(O, I)], falling: the
        error at rank r is the sum of λ from index r on; and the damping of H, 0 if it was not factorised.

    Source: the result of SVD-LLM (arXiv 2403.07378).
    """
    wide_OI, damping = W_OI.double(), 0.0
    if len(W_OI) <= W_OI.shape[1]:
        product_OO = wide_OI.new_zeros(len(W_OI), len(W_OI))
        for start in range(0, W_OI.shape[1], _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            product_OO.addmm_(wide_OI @ H_II[:, columns].double(), wide_OI[:, columns].T)
        eigenvalues, P_OO = torch.linalg.eigh(product_OO)
        A = P_OO[:, -rank:].flip(1)
        B = A.T @ wide_OI
    else:
        U_II, damping = inverse_factor(H_II.double(), 1e-6)
        # H = (Uᵀ U)⁻¹, so ||E U⁻¹||² is the output error of E
        white_OI = torch.linalg.solve_triangular(U_II, wide_OI, upper=True, left=False)
        del wide_OI
        eigenvalues, Q_II = torch.linalg.eigh(white_OI.T @ white_OI)
        Q = Q_II[:, -rank:].flip(1)
        A, B = white_OI @ Q, Q.T @ U_II
    scale_R = (B.norm(dim=1) / A.norm(dim=0).clamp_min(1e-30)).sqrt().clamp_min(1e-30)
    return (
        (A * scale_R).to(W_OI.dtype),
        (B / scale_R[:, None]).to(W_OI.dtype),
        eigenvalues.flip(0).clamp_min(0),
        damping,
    )
