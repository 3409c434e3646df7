"""`overflowing` against its definition."""

from __future__ import annotations

import torch

from compress.solvers.quant_format import overflowing


def test_overflowing_counts_only_what_rounds_to_infinity():
    values = torch.tensor([65504.0, 65519.9, 65520.0, -70000.0, float("inf"), float("nan"), 1.0])
    assert overflowing(values, torch.float16) == 2
