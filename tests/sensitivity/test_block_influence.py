"""Block influence against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from compress.sensitivity.block_influence import influence


def test_influence_is_one_minus_the_mean_cosine():
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    total = 0.0
    for i in range(2):
        for j in range(3):
            x, y = before[i, j].tolist(), after[i, j].tolist()
            dot = sum(a * b for a, b in zip(x, y, strict=True))
            total += 1 - dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in y))
    found, count = influence(before, after)
    assert count == 6
    assert found == pytest.approx(total, abs=1e-6)
    weights = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    assert influence(before, before, weights) == (pytest.approx(0, abs=1e-6), 1)
