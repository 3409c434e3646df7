"""Tables of embeddings as a thin table and a projection: the nearest ones where it counts.

Letters: V tokens, h hidden channels, r the rank. E [V, h] is the table that tokens are looked up by, W [V, h] the one that they
are predicted by, f [V] how often each token is read, H [h, h] = Σ x xᵀ of the hidden states that predictions are made of.
"""

from __future__ import annotations

import torch

from compress.solvers.low_rank import low_rank

#: Turns of the alternation; the first few bring nearly all of it.
_TURNS = 20


def thin_input(E_Vh: torch.Tensor, f_V: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [V, r] and P [r, h] of least Σ f ‖e - a P‖²; float64."""
    E_Vh = E_Vh.double()
    _, vectors = torch.linalg.eigh(E_Vh.T @ (E_Vh * f_V[:, None]))
    P_rh = vectors[:, -rank:].T
    return E_Vh @ P_rh.T, P_rh


def thin_output(W_Vh: torch.Tensor, H_hh: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [V, r] and Q [r, h] of least ‖(W - A Q) X‖²; float64."""
    A_Vr, Q_rh, _, _ = low_rank(W_Vh.double(), H_hh, rank)
    return A_Vr, Q_rh


def thin_tied(
    E_Vh: torch.Tensor, f_V: torch.Tensor, H_hh: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A [V, r], P and Q [r, h] of least Σ f ‖e - a P‖² / Σ f ‖e‖² + ‖(E - A Q) X‖² / ‖E X‖²; float64.

    By turns: the two projections for a table, the table for two projections; no turn makes it worse.
    """
    E_Vh = E_Vh.double()
    H_hh = H_hh.double() / torch.trace(E_Vh.T @ E_Vh @ H_hh.double()).clamp_min(1e-30)
    f_V = f_V.double() / (f_V.double() * E_Vh.square().sum(1)).sum().clamp_min(1e-30)
    both = E_Vh.T @ (E_Vh * f_V[:, None])
    both = both / torch.trace(both).clamp_min(1e-30)
    A_Vr, _ = thin_output(E_Vh, H_hh + both * torch.trace(H_hh), rank)
    P_rh = Q_rh = torch.empty(0)
    for _ in range(_TURNS):
        P_rh = torch.linalg.lstsq(A_Vr * f_V.sqrt()[:, None], E_Vh * f_V.sqrt()[:, None]).solution
        Q_rh = torch.linalg.lstsq(A_Vr, E_Vh).solution
        # each row of A by itself: a (f P Pᵀ + Q H Qᵀ) = f e Pᵀ + e H Qᵀ, all of them diagonal in one basis
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
