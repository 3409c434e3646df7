"""Block influence against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from compress.checkpoint.open import open_checkpoint
from compress.data.batches import Batches
from compress.progress import SilentProgress
from compress.sensitivity.block_influence import block_influence, influence
from tests import pico


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


# --- influence


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "bert"])
def test_block_influence_ignores_padding(family, tmp_path):
    """Samples of several lengths, padded, score as they do one by one."""
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", family))
    how = {"dtype": "float32", "device": "cpu", "progress": SilentProgress()}
    lengths = (40, 24, 5)
    rows = [torch.randint(2, 250, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    ids, mask = torch.zeros(3, 40, dtype=torch.long), torch.zeros(3, 40, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    padded = block_influence(checkpoint, Batches(ids, mask), **how)
    single = [block_influence(checkpoint, Batches(row[None]), **how) for row in rows]
    expected = [sum(n * s[b] for n, s in zip(lengths, single, strict=True)) / sum(lengths) for b in range(4)]
    assert padded == pytest.approx(expected, rel=1e-4)
    assert block_influence(checkpoint, Batches(ids), **how) != pytest.approx(expected, rel=1e-4)
