"""Outlier weighed layerwise sparsity, OWL (arXiv 2310.05175): blocks with more outliers are pruned less.

Letters: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def outliers(W_OI: torch.Tensor, diag_I: torch.Tensor, times: float = 5.0) -> tuple[int, int]:
    """How many weights have a score |W_ij| · sqrt(H_jj) above ``times`` the matrix's mean score, and how many there are."""
    score_OI = W_OI.abs().float() * diag_I.float().sqrt()
    return int((score_OI > times * score_OI.mean()).sum()), score_OI.numel()


def owl_sparsities(ratios: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float = 0.08) -> list[float]:
    """Sparsity of each block, within ``spread`` of each other's middle, ``sparsity`` on average over weights.

    Args:
        ratios: share of outliers of each block. sizes: number of weights of each.
        spread: the paper's lambda: kept shares differ by at most twice as much.
    """
    lowest, highest = min(ratios), max(ratios)
    if highest == lowest:
        return [sparsity] * len(ratios)
    kept = [2 * spread * (r - lowest) / (highest - lowest) for r in ratios]
    mean = sum(k * n for k, n in zip(kept, sizes, strict=True)) / sum(sizes)
    return [min(max(sparsity - (k - mean), 0.0), 1.0) for k in kept]
