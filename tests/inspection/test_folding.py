from __future__ import annotations

import pytest

from compress.inspection.folding import folded, ranges


def test_ranges_joins_neighbours():
    assert ranges([4, 0, 1, 2, 6, 7]) == "0…2, 4, 6, 7"
    assert ranges([]) == ""


def test_folded_joins_equal_blocks_and_experts():
    rows = [(f"layers.{i}.experts.{j}.up", "a" if i != 2 else "b") for i in range(4) for j in range(3)]
    assert folded([("embed", "a"), *rows, ("norm", "a")]) == [
        ("embed", ["embed"]),
        ("layers.{0, 1, 3}.experts.{0…2}.up", [f"layers.{i}.experts.{j}.up" for i in (0, 1, 3) for j in range(3)]),
        ("layers.2.experts.{0…2}.up", [f"layers.2.experts.{j}.up" for j in range(3)]),
        ("norm", ["norm"]),
    ]


def test_folded_keeps_experts_apart_that_not_all_blocks_have():
    rows = [("l.0.e.0.up", ""), ("l.0.e.1.up", ""), ("l.1.e.0.up", "")]
    assert [name for name, _ in folded(rows)] == ["l.0.e.{0, 1}.up", "l.1.e.0.up"]


@pytest.mark.parametrize("names", [["a.0", "a.00"], ["a.1x.b", "a.2x.b"], ["a1.b", "a2.b"], ["a." + "9" * 5000, "a.1"]])
def test_folded_leaves_other_numbers_alone(names):
    assert folded([(name, "") for name in names]) == [(name, [name]) for name in names]
