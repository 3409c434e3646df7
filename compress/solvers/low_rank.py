"""A weight matrix as the product of two of low rank, with the least error of its outputs.

Letters: O outputs, I inputs, R ranks. For H = Σ x xᵀ the error ||(W - V)X||² is tr((W - V) H (W - V)ᵀ).
"""

from __future__ import annotations

import torch

from compress.solvers.hessian import inverse_factor


def low_rank(
    W_OI: torch.Tensor, H_II: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Factors A B of that rank nearest to W in its outputs: the best there are for inputs of these statistics.

    What SVD-LLM (arXiv 2403.07378) finds by the singular values of W L, with H = L Lᵀ: its left singular vectors are the
    eigenvectors P of W H Wᵀ, and A B = P Pᵀ W. Where there are more outputs than inputs, the smaller problem of its right
    ones is solved instead.

    Args:
        W_OI: weights, [out, in]. H_II: sum of x xᵀ, symmetric, float32 or float64.

    Returns:
        A [out, rank] and B [rank, in] in W's dtype, of equal norms for each rank; the energies λ [min(O, I)], falling: the
        error at rank r is the sum of λ from r on; and the damping it took, 0 for none.
    """
    wide_OI, damping = W_OI.double(), 0.0
    H = H_II.double()
    if len(W_OI) <= W_OI.shape[1]:
        energies, P_OO = torch.linalg.eigh(wide_OI @ H @ wide_OI.T)
        A = P_OO[:, -rank:].flip(1)
        B = A.T @ wide_OI
    else:
        U_II, damping = inverse_factor(H, 1e-6)
        # H = (Uᵀ U)⁻¹, so E U⁻¹ has the norm of E's outputs
        white_OI = torch.linalg.solve_triangular(U_II, wide_OI, upper=True, left=False)
        energies, Q_II = torch.linalg.eigh(white_OI.T @ white_OI)
        Q = Q_II[:, -rank:].flip(1)
        A, B = white_OI @ Q, Q.T @ U_II
    scale_R = (B.norm(dim=1) / A.norm(dim=0).clamp_min(1e-30)).sqrt().clamp_min(1e-30)
    return (A * scale_R).to(W_OI.dtype), (B / scale_R[:, None]).to(W_OI.dtype), energies.flip(0).clamp_min(0), damping
