"""Rates of learning by schedule."""

from __future__ import annotations

import pytest

from compress.training.optimize import Update


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.5, 0.0625]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.5, 0.0096]),
        ("wsd", [0.25, 0.5, 0.75, 1, 1, 1, 0.125]),
    ],
)
def test_update_rate_follows_schedule(schedule, expected):
    update = Update(schedule=schedule, warmup=0.2)
    assert [update.factor(step, 20) for step in (0, 1, 2, 3, 4, 12, 19)] == pytest.approx(expected, abs=1e-4)
