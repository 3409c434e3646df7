"""Defaults of rate and warmup."""

from __future__ import annotations

import pytest

from compress.passes.distill.plan import default_rate, default_warmup


def test_default_rate_and_warmup_follow_steps_and_width():
    assert default_rate(500, 256) == default_rate(4000, 32) == 5e-4
    assert default_rate(20, 256) == pytest.approx(1e-4)
    assert default_rate(500, 1024) == pytest.approx(2.5e-4)
    assert [default_warmup(n) * n for n in (4, 20, 50, 500)] == pytest.approx([1, 5, 5, 25])
