"""One weight matrix in place of several, and units of two layers put into the same order.

Letters: O outputs, I inputs, U units (neurons, heads), B blocks that share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.solvers.hessian import inverse_factor


def shared_matrix(
    W_BOI: Sequence[torch.Tensor], H_BII: Sequence[torch.Tensor], damp: float = 0.01
) -> tuple[torch.Tensor, float]:
    """The matrix whose outputs are nearest to those of all: it minimises Σ_b tr((W - W_b) H_b (W - W_b)ᵀ).

    W = (Σ W_b H_b) (Σ H_b)⁻¹, which is the mean where all have the same inputs; the damping holds W near the mean.

    Args:
        W_BOI: weights of each block, [out, in]. H_BII: of each Σ x xᵀ, times how much its errors count.

    Returns:
        W in the weights' dtype, and the damping used (see `hessian.inverse_factor`).
    """
    mean_OI = torch.stack([W.double() for W in W_BOI]).mean(0)
    total_II = torch.stack([H.double() for H in H_BII]).sum(0)
    pull_OI = sum(((W.double() - mean_OI) @ H.double() for W, H in zip(W_BOI, H_BII, strict=True)), torch.zeros(()))
    U_II, damping = inverse_factor(total_II, damp)
    return (mean_OI + (pull_OI @ U_II.T) @ U_II).to(W_BOI[0].dtype), damping


def pair_cost(W_OI: torch.Tensor, V_OI: torch.Tensor, h_I: torch.Tensor, k_I: torch.Tensor) -> float:
    """Least error of the outputs of two matrices that become one, with the statistics of their inputs by input alone.

    For diagonal H and K it is Σ (w - v)² h k / (h + k).

    Args:
        W_OI, V_OI: weights. h_I, k_I: Σ x² of their inputs.
    """
    both_I = h_I.double() * k_I.double() / (h_I.double() + k_I.double()).clamp_min(1e-30)
    return float(((W_OI.double() - V_OI.double()).square() @ both_I).sum())


def matching(likeness_UU: torch.Tensor) -> list[int]:
    """For each unit of the first layer that of the second to take its place, so that the sum of likenesses is greatest.

    A linear assignment, as in Git Re-Basin (arXiv 2209.04836), weight matching.

    Args:
        likeness_UU: of unit i of the first and j of the second.
    """
    from scipy.optimize import linear_sum_assignment

    _, chosen = linear_sum_assignment(likeness_UU.cpu().numpy(), maximize=True)
    return [int(i) for i in chosen]


def partition(cost_BB: Sequence[Sequence[float]], starts: Sequence[Sequence[int]]) -> list[int]:
    """Which group each block goes to, groups of equal size, for the least sum of costs between members of a group.

    From each start blocks are exchanged between groups while that helps (2-opt); the best end is taken.

    Args:
        cost_BB: symmetric, of any two blocks in one group; infinite where they cannot be. starts: groups by block.
    """
    best: tuple[float, list[int]] | None = None
    for start in starts:
        groups = list(start)
        total, better = _total(cost_BB, groups), True
        while better:
            better = False
            for i in range(len(groups)):
                for j in range(i):
                    if groups[i] == groups[j]:
                        continue
                    groups[i], groups[j] = groups[j], groups[i]
                    changed = _total(cost_BB, groups)
                    if changed < total:
                        total, better = changed, True
                    else:
                        groups[i], groups[j] = groups[j], groups[i]
        if best is None or total < best[0]:
            best = (total, groups)
    assert best is not None
    return best[1]


def _total(cost_BB: Sequence[Sequence[float]], groups: Sequence[int]) -> float:
    count = len(groups)
    return sum(cost_BB[i][j] for i in range(count) for j in range(i) if groups[i] == groups[j])
