from __future__ import annotations

import pytest
import torch

from compress.inspection import diff, difference_tables
from compress.inspection.matching import _cheapest
from compress.inspection.rows import block_lines
from tests import pico


def without_blocks(folder, removed, family="llama", path="model.layers"):
    """A pico model of six blocks and the same without some, each written below the folder; its matrices are a little off."""
    whole = pico.model(family, num_hidden_layers=6)
    kept = [i for i in range(6) if i not in removed]
    small = pico.model(family, num_hidden_layers=len(kept), seed=1)
    state = whole.state_dict()
    for new, old in enumerate(kept):
        for name in [name for name in small.state_dict() if name.startswith(f"{path}.{new}.")]:
            value = state[name.replace(f"{path}.{new}.", f"{path}.{old}.", 1)]
            small.state_dict()[name].copy_(value if value.ndim == 1 else value * 1.01)
    for name, value in state.items():
        if not name.startswith(f"{path}."):
            small.state_dict()[name].copy_(value)
    whole.save_pretrained(folder / "whole")
    small.save_pretrained(folder / "small")
    return folder / "whole", folder / "small"


@pytest.mark.parametrize("values", [True, False])
def test_diff_matches_renumbered_blocks(tmp_path, values):
    whole, small = without_blocks(tmp_path, (1, 4))
    data = diff(whole, small, values=values)
    assert data["blocks"] == [
        {"path": "model.layers", "removed": [1, 4], "added": [], "renumbered": [[2, 1], [3, 2], [5, 3]]}
    ]
    assert block_lines(data) == ["model.layers: blocks 1, 4 removed; 2, 3 ▶ 1, 2; 5 ▶ 3"]
    if values:
        changed = [row for row in data["tensors"] if row["change"] == "changed"]
        assert all(row["relative_difference"] == pytest.approx(0.01, rel=1e-3) for row in changed)
        assert next(row for row in changed if ".5." in row["name"])["name_after"].startswith("model.layers.3.")
        rows = difference_tables(data)[-1].rows
        assert [row[:3] for row in rows][:3] == [
            ("model.layers.1.*", "9 ×", "removed"),
            ("model.layers.4.*", "9 ×", "removed"),
            ("model.layers.{0, 2, 3, 5}.mlp.down_proj.weight", "4 ×", "values"),
        ]


def test_diff_of_the_reverse_says_that_blocks_were_added(tmp_path):
    whole, small = without_blocks(tmp_path, (4,))
    data = diff(small, whole)
    assert block_lines(data) == ["model.layers: block 4 added; 4 ▶ 5"]
    assert sum(row["change"] == "added" for row in data["tensors"]) == 9
    assert not any(row["change"] == "removed" for row in data["tensors"])


def test_cheapest_equals_trying_all():
    from itertools import combinations

    for seed in range(20):
        costs = torch.rand(6, 1 + seed % 6, generator=torch.Generator().manual_seed(seed)).tolist()
        short = len(costs[0])
        best = min(combinations(range(6), short), key=lambda rows: sum(costs[r][s] for s, r in enumerate(rows)))
        assert tuple(_cheapest(costs)) == best
