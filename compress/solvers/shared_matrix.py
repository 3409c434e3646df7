"""Replace several weight matrices by a shared one, match the units of two layers, and group blocks.

Letters: O outputs, I inputs, U units (neurons, heads), B blocks that share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.solvers.hessian import inverse_factor


def shared_matrix(
    W_BOI: Sequence[torch.Tensor], H_BII: Sequence[torch.Tensor], damp: float = 0.01
) -> tuple[torch.Tensor, float]:
    """Return the matrix W of least Σ_b tr((W - W_b) H_b (W - W_b)ᵀ), and the damping used.

    W = (Σ W_b H_b) (Σ H_b)⁻¹, the mean if all blocks have the same inputs. It is computed as the mean plus
    Σ (W_b - mean) H_b (Σ H_b)⁻¹, so that damping pulls it towards the mean.

    Args:
        W_BOI: weights of each block, [out, in].
        H_BII: sum of x xᵀ of each block, [in, in], times the weight of its errors; the work is in its dtype. Both are read one
            block at a time, so they may be in files.
        damp: damping in units of the mean of the diagonal of Σ H_b.

    Returns:
        W [out, in] in the weights' dtype, and the damping (see `hessian.inverse_factor`).

    Raises:
        ValueError: an H holds NaN or infinite values.
    """
    dtype, count = H_BII[0].dtype, len(W_BOI)
    mean_OI = W_BOI[0].to(dtype, copy=True)
    for b in range(1, count):
        mean_OI += W_BOI[b]
    mean_OI /= count
    total_II, pull_OI = torch.zeros_like(H_BII[0]), torch.zeros_like(mean_OI)
    for b in range(count):
        H_II = H_BII[b]
        total_II += H_II
        pull_OI.addmm_(W_BOI[b].to(dtype) - mean_OI, H_II)
        del H_II
    U_II, damping = inverse_factor(total_II, damp)
    del total_II
    return mean_OI.add_((pull_OI @ U_II.T) @ U_II).to(W_BOI[0].dtype), damping


def pair_cost(W_OI: torch.Tensor, V_OI: torch.Tensor, h_I: torch.Tensor, k_I: torch.Tensor) -> float:
    """Return the least output error of one matrix in place of W and V, with the Hessians taken to be diagonal.

    For each entry the minimum of h (u - w)² + k (u - v)² over u is (w - v)² h k / (h + k).

    Args:
        W_OI, V_OI: weights. h_I, k_I: diagonals of the sums of x xᵀ of their inputs.
    """
    both_I = h_I.double() * k_I.double() / (h_I.double() + k_I.double()).clamp_min(1e-30)
    return float(((W_OI.double() - V_OI.double()).square() @ both_I).sum())


def matching(similarity_UU: torch.Tensor) -> list[int]:
    """Return for each unit of the first layer the index of its match in the second, with the largest sum of similarities.

    A linear assignment; needs scipy.

    Args:
        similarity_UU: similarity of unit i of the first layer and unit j of the second.

    Source: weight matching of Git Re-Basin (arXiv 2209.04836).
    """
    from scipy.optimize import linear_sum_assignment

    _, chosen = linear_sum_assignment(similarity_UU.cpu().numpy(), maximize=True)
    return [int(i) for i in chosen]


def partition(cost_BB: Sequence[Sequence[float]], starts: Sequence[Sequence[int]]) -> list[int]:
    """Return the group of each block, for a low sum of costs between members of a group; group sizes are those of the start.

    From each start, blocks are exchanged between groups while that lowers the sum (2-opt). The best result is returned.

    Args:
        cost_BB: symmetric cost of two blocks in one group; infinite if they cannot share.
        starts: partitions to start from, each the group of every block.
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
