"""Scales that move the difficulty of rounding from inputs to weights. Source: SmoothQuant, arXiv 2211.10438."""

from __future__ import annotations

import torch

#: Smallest scale, as in the source.
_LEAST = 1e-5


def smoothing_scales(X_I: torch.Tensor, W_I: torch.Tensor, strength: float) -> torch.Tensor:
    """Scales to divide inputs by, float64 [I]: X^strength / W^(1 - strength), and 1 where one of both is 0.

    Args:
        X_I: largest magnitudes of each input. W_I: of the weights that read it.
    """
    X_I, W_I = X_I.double(), W_I.double()
    scales = (X_I**strength / W_I ** (1 - strength)).clamp(min=_LEAST)
    return torch.where((X_I > 0) & (W_I > 0), scales, 1.0)
