"""Block influence of ShortGPT (arXiv 2403.03853, equation 1)."""

from __future__ import annotations

import torch


def influence(before: torch.Tensor, after: torch.Tensor, weights: torch.Tensor | None = None) -> tuple[float, float]:
    """Return the sum over tokens of 1 - cos(before, after), and the number of tokens.

    Args:
        before, after: hidden states at a block's input and output, [..., hidden], any float dtype; cosines are in float32.
        weights: 1 for tokens that count, 0 for padding, [...]; None if all count.
    """
    cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).double()
    if weights is None:
        return float((1 - cosine).sum()), float(cosine.numel())
    return float(((1 - cosine) * weights).sum()), float(weights.sum())
