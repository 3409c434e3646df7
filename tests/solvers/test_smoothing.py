from __future__ import annotations

import pytest
import torch

from compress.solvers.smoothing import smoothing_scales


def test_smoothing_scales_are_those_of_the_paper():
    X, W = torch.tensor([4.0, 0.25, 9.0]), torch.tensor([1.0, 4.0, 0.01])
    for strength in (0.25, 0.5, 0.8):
        expected = [x**strength / w ** (1 - strength) for x, w in zip(X.tolist(), W.tolist(), strict=True)]
        assert smoothing_scales(X, W, strength).tolist() == pytest.approx(expected)


def test_at_a_half_inputs_and_weights_are_equally_large():
    X, W = torch.tensor([4.0, 0.25, 9.0]), torch.tensor([1.0, 4.0, 0.01])
    scales = smoothing_scales(X, W, 0.5)
    assert torch.allclose(X.double() / scales, W.double() * scales)


def test_channels_that_nothing_writes_or_reads_stay():
    assert smoothing_scales(torch.tensor([0.0, 3.0]), torch.tensor([2.0, 0.0]), 0.5).tolist() == [1, 1]
