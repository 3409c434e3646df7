from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.solvers.owl import outliers, owl_sparsities


def test_outliers_match_definition():
    generator = torch.Generator().manual_seed(0)
    weight, diagonal = torch.randn(7, 11, generator=generator) ** 3, torch.rand(11, generator=generator)
    scores = [[abs(float(weight[i, j])) * float(diagonal[j]) ** 0.5 for j in range(11)] for i in range(7)]
    mean = sum(map(sum, scores)) / 77
    assert outliers(weight, diagonal, 3.0) == (sum(s > 3 * mean for row in scores for s in row), 77)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=1, max_size=8), st.floats(0.2, 0.8))
def test_owl_sparsities_average_to_target_and_spare_outliers(rows, sparsity):
    ratios, sizes = [r for r, _ in rows], [n for _, n in rows]
    found = owl_sparsities(ratios, sizes, sparsity)
    assert sum(s * n for s, n in zip(found, sizes, strict=True)) / sum(sizes) == pytest.approx(sparsity, abs=1e-9)
    assert max(found) - min(found) <= 0.16 + 1e-9
    for a, b in zip(sorted(zip(ratios, found, strict=True)), sorted(zip(ratios, found, strict=True))[1:], strict=False):
        assert b[1] <= a[1] + 1e-9


def test_owl_sparsities_match_paper_code():
    """Its code: (r - min) / (max - min) * 2 λ, less the mean, plus the kept share."""
    ratios = torch.tensor([0.02, 0.05, 0.03])
    kept = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * 0.08 * 2)
    kept = kept - kept.mean() + (1 - 0.7)
    assert owl_sparsities(ratios.tolist(), [10, 10, 10], 0.7) == pytest.approx((1 - kept).tolist())
