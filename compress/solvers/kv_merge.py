"""Several attention heads that become one: turned so that they are alike, then their mean.

Letters: G heads, D outputs of a head, I inputs. H_II is the sum of x xᵀ over tokens, damped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

#: Rounds of turning each head towards the mean of all as they are turned so far.
_ROUNDS = 4


def align_values(V_GDI: torch.Tensor, H_II: torch.Tensor) -> torch.Tensor:
    """Rotations R [G, D, D] with which the heads' outputs R_g V_g x come nearest to each other.

    Whatever reads head g reads the same when its weights are multiplied by R_gᵀ. Heads that are alike already stay as they are.

    Source: generalised Procrustes analysis (Gower 1975); of attention heads as in arXiv 2412.20677.
    """
    return _aligned(V_GDI, H_II, _rotation)


def align_keys(K_GDI: torch.Tensor, H_II: torch.Tensor, rotary: int) -> torch.Tensor:
    """The same among rotations that rotary positions leave alone: entry p turns with p + rotary/2, by an angle for each pair.

    Scores stay what they are when queries of head g are turned by R_g too. Entries from ``rotary`` on do not turn.
    """
    return _aligned(K_GDI, H_II, lambda M_DD: _turns(M_DD, rotary))


def merge(W_GDI: torch.Tensor, into: int) -> torch.Tensor:
    """Every run of G / ``into`` neighbouring heads (weights [G, D, I], or biases [G, D]) replaced by its mean."""
    runs = W_GDI.reshape(into, -1, *W_GDI.shape[1:])
    return runs.mean(1, keepdim=True).expand_as(runs).flatten(0, 1)


def _aligned(W_GDI: torch.Tensor, H_II: torch.Tensor, nearest: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    weights = W_GDI.to(H_II.dtype)
    mean = weights[0]
    for _ in range(_ROUNDS):
        turns = torch.stack([nearest(mean @ H_II @ weight.T) for weight in weights])
        mean = (turns @ weights).mean(0)
    return turns


def _rotation(M_DD: torch.Tensor) -> torch.Tensor:
    """The orthogonal R of largest tr(Rᵀ M)."""
    left, _, right = torch.linalg.svd(M_DD)
    product: torch.Tensor = left @ right
    return product


def _turns(M_DD: torch.Tensor, rotary: int) -> torch.Tensor:
    """The R of largest tr(Rᵀ M) that turns pairs alone."""
    half = rotary // 2
    one, other = torch.arange(half, device=M_DD.device), torch.arange(half, rotary, device=M_DD.device)
    angle = torch.atan2(M_DD[other, one] - M_DD[one, other], M_DD[one, one] + M_DD[other, other])
    R_DD = torch.eye(len(M_DD), dtype=M_DD.dtype, device=M_DD.device)
    R_DD[one, one] = R_DD[other, other] = angle.cos()
    R_DD[other, one] = angle.sin()
    R_DD[one, other] = -angle.sin()
    return R_DD
