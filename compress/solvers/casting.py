"""Casts between float formats."""

from __future__ import annotations

import torch


def overflowing(values: torch.Tensor, target: torch.dtype) -> int:
    """Return how many finite values overflow to infinity in ``target``, rounded to nearest even."""
    return int((torch.isinf(values.to(target)) & torch.isfinite(values)).sum())
