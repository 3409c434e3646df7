"""Casting floats."""

from __future__ import annotations

import torch


def overflowing(values: torch.Tensor, target: torch.dtype) -> int:
    """How many finite values would become infinite in ``target``, after rounding to nearest even."""
    return int((torch.isinf(values.to(target)) & torch.isfinite(values)).sum())
