"""The picture of a front, where its trials have the same value of a goal."""

from __future__ import annotations

import pytest

from compress.report.pictures.front import Axis, TrialPoint, front_picture


@pytest.mark.parametrize("value", [0.2, 0.0, -3.0])
def test_trials_of_the_same_size_are_drawn(value):
    points = [TrialPoint(i, (value,) * 3, (y,) * 3, "front") for i, y in enumerate((0.1, 0.4), 1)]
    picture = front_picture(points, Axis("size", True, str), Axis("loss", True, str))
    assert sum("<circle" in part for part in picture.body) == 2
