"""Merge attention heads: align them by rotations that do not change the model, then take their mean.

Letters: G heads, D outputs of a head, I inputs. H_II is the sum of x xᵀ over tokens, damped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

#: Rounds of aligning every head with the mean of the aligned heads.
_ROUNDS = 4


def align_values(V_GDI: torch.Tensor, H_II: torch.Tensor) -> torch.Tensor:
    """Return rotations R [G, D, D] that bring the heads' outputs R_g V_g x close to each other, in H's dtype.

    The model does not change if the weights that read head g are multiplied by R_gᵀ. Equal heads are not turned.

    Args:
        V_GDI: weights of the heads, [heads, head outputs, in].
        H_II: sum of x xᵀ, damped.

    Source: generalised Procrustes analysis (Gower 1975); of attention heads as in arXiv 2412.20677.
    """
    return _aligned(V_GDI, H_II, _procrustes)


def align_keys(K_GDI: torch.Tensor, H_II: torch.Tensor, rotary: int) -> torch.Tensor:
    """Return such rotations that commute with rotary positions: an angle for each pair of entries (p, p + rotary/2).

    Attention scores do not change if the queries of head g are turned by R_g too. Entries from ``rotary`` on are not turned.
    Arguments are those of `align_values`.
    """
    return _aligned(K_GDI, H_II, lambda M_DD: _pair_rotations(M_DD, rotary))


def merge(W_GDI: torch.Tensor, into: int) -> torch.Tensor:
    """Return weights [G, D, I] or biases [G, D] in which every run of G / ``into`` neighbouring heads is its mean."""
    runs = W_GDI.reshape(into, -1, *W_GDI.shape[1:])
    return runs.mean(1, keepdim=True).expand_as(runs).flatten(0, 1)


def _aligned(W_GDI: torch.Tensor, H_II: torch.Tensor, nearest: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return R [G, D, D]; ``nearest`` gives the allowed R of largest tr(Rᵀ C) for a matrix C [D, D].

    Σ ||R W_g x - M x||² is least where tr(Rᵀ M H W_gᵀ) is largest, M being the mean of the aligned heads.
    """
    weights = W_GDI.to(H_II.dtype)
    mean = weights[0]
    for _ in range(_ROUNDS):
        rotations = torch.stack([nearest(mean @ H_II @ weight.T) for weight in weights])
        mean = (rotations @ weights).mean(0)
    return rotations


def _procrustes(M_DD: torch.Tensor) -> torch.Tensor:
    """Return the orthogonal R [D, D] of largest tr(Rᵀ M): A Bᵀ of the SVD M = A Σ Bᵀ (Procrustes)."""
    left, _, right = torch.linalg.svd(M_DD)
    product: torch.Tensor = left @ right
    return product


def _pair_rotations(M_DD: torch.Tensor, rotary: int) -> torch.Tensor:
    """Return the R of largest tr(Rᵀ M) that turns each pair (p, q = p + rotary/2) by an angle θ.

    The pair's share of the trace is cos θ (M_pp + M_qq) + sin θ (M_qp - M_pq), largest at
    θ = atan2(M_qp - M_pq, M_pp + M_qq).
    """
    half = rotary // 2
    one, other = torch.arange(half, device=M_DD.device), torch.arange(half, rotary, device=M_DD.device)
    angle = torch.atan2(M_DD[other, one] - M_DD[one, other], M_DD[one, one] + M_DD[other, other])
    R_DD = torch.eye(len(M_DD), dtype=M_DD.dtype, device=M_DD.device)
    R_DD[one, one] = R_DD[other, other] = angle.cos()
    R_DD[other, one] = angle.sin()
    R_DD[one, other] = -angle.sin()
    return R_DD
