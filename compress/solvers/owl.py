"""OWL, outlier weighed layerwise sparsity (arXiv 2310.05175): blocks with more outliers are pruned less.

Letters: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def outliers(W_OI: torch.Tensor, diag_I: torch.Tensor, times: float = 5.0) -> tuple[int, int]:
    """Return how many weights score above ``times`` the matrix's mean, and the number of weights.

    Args:
        W_OI: weights, [out, in]. diag_I: diagonal of the sum of x xᵀ, [in]. The score is |W_ij| · sqrt(H_jj), in float32.
    """
    score_OI = W_OI.abs().float() * diag_I.float().sqrt()
    return int((score_OI > times * score_OI.mean()).sum()), score_OI.numel()


def owl_sparsities(ratios: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float = 0.08) -> list[float]:
    """Return the sparsity of each block, ``sparsity`` on average over all weights.

    Args:
        ratios: each block's share of outliers.
        sizes: each block's number of weights.
        sparsity: mean share of weights to remove.
        spread: the paper's lambda; the sparsities of two blocks differ by at most twice as much.
    """
    lowest, highest = min(ratios), max(ratios)
    if highest == lowest:
        return [sparsity] * len(ratios)
    kept = [2 * spread * (r - lowest) / (highest - lowest) for r in ratios]
    mean = sum(k * n for k, n in zip(kept, sizes, strict=True)) / sum(sizes)
    return [min(max(sparsity - (k - mean), 0.0), 1.0) for k in kept]
