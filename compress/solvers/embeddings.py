"""Factorise embeddings into a thin table and a projection, weighted by how calibration data read and predict tokens.

Letters: V tokens, h hidden channels, r the rank. E [V, h] is the input embedding, W [V, h] the output embedding, f [V] the
frequency of each token in the input, H [h, h] = Σ x xᵀ over the hidden states that the head reads.
"""

from __future__ import annotations

import torch

from compress.solvers.low_rank import low_rank

#: Rounds of the alternation; the first few give nearly all of the gain.
_ROUNDS = 20


def thin_input(E_Vh: torch.Tensor, f_V: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [V, r] and P [r, h] of least Σ f ‖e - a P‖², float64: the leading eigenvectors of Eᵀ diag(f) E."""
    E_Vh = E_Vh.double()
    _, vectors = torch.linalg.eigh(E_Vh.T @ (E_Vh * f_V[:, None]))
    P_rh = vectors[:, -rank:].T
    return E_Vh @ P_rh.T, P_rh


def thin_output(W_Vh: torch.Tensor, H_hh: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [V, r] and Q [r, h] of least ‖(W - A Q) X‖², float64; see `low_rank.low_rank`."""
    A_Vr, Q_rh, _, _ = low_rank(W_Vh.double(), H_hh, rank)
    return A_Vr, Q_rh


def thin_tied(
    E_Vh: torch.Tensor, f_V: torch.Tensor, H_hh: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return A [V, r], P and Q [r, h] of a low Σ f ‖e - a P‖² / Σ f ‖e‖² + ‖(E - A Q) X‖² / ‖E X‖², float64.

    The projections are solved for the table, then the table for the projections, 20 times. No step raises the sum.

    A row a solves a (f P Pᵀ + Q H Qᵀ) = f e Pᵀ + e H Qᵀ. One basis T makes all these matrices diagonal: with Q H Qᵀ = L Lᵀ and
    L⁻¹ P Pᵀ L⁻ᵀ = Z Λ Zᵀ, T = L⁻ᵀ Z gives Tᵀ Q H Qᵀ T = 1 and Tᵀ P Pᵀ T = Λ. So a is the right side times T (1 + f Λ)⁻¹ Tᵀ.
    """
    E_Vh = E_Vh.double()
    H_hh = H_hh.double() / torch.trace(E_Vh.T @ E_Vh @ H_hh.double()).clamp_min(1e-30)
    f_V = f_V.double() / (f_V.double() * E_Vh.square().sum(1)).sum().clamp_min(1e-30)
    both = E_Vh.T @ (E_Vh * f_V[:, None])
    both = both / torch.trace(both).clamp_min(1e-30)
    A_Vr, _ = thin_output(E_Vh, H_hh + both * torch.trace(H_hh), rank)
    P_rh = Q_rh = torch.empty(0)
    for _ in range(_ROUNDS):
        P_rh = torch.linalg.lstsq(A_Vr * f_V.sqrt()[:, None], E_Vh * f_V.sqrt()[:, None]).solution
        Q_rh = torch.linalg.lstsq(A_Vr, E_Vh).solution
        # T for all rows of A, see above; the diagonal is raised a little so that the factor exists
        S_rr = Q_rh @ H_hh @ Q_rh.T
        S_rr.diagonal().add_(1e-10 * S_rr.diagonal().mean())
        lower = torch.linalg.cholesky(S_rr)
        inner = torch.linalg.solve_triangular(lower, P_rh @ P_rh.T, upper=False)
        inner = torch.linalg.solve_triangular(lower, inner.T, upper=False)
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        T_rr = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
        right = f_V[:, None] * (E_Vh @ P_rh.T) + E_Vh @ H_hh @ Q_rh.T
        A_Vr = ((right @ T_rr) / (1 + f_V[:, None] * values)) @ T_rr.T
    return A_Vr, P_rh, Q_rh
