from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.blockwise.spilled import MappedTables, SpilledValues, spilling_backward


def test_spilled_values_come_back_in_any_layout(tmp_path: Path) -> None:
    tensors = [torch.randn(3, 5).T, torch.tensor(2.5), torch.randn(4).bfloat16(), torch.arange(6).view(2, 3)[:, 1]]
    before = [t.clone() for t in tensors]
    spilled = SpilledValues(tmp_path, tensors)
    for t in tensors:
        t.add_(1)
    after = [t.clone() for t in tensors]
    spilled.swap()
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    spilled.swap()
    assert all(torch.equal(t, a) for t, a in zip(tensors, after, strict=True))
    spilled.swap()
    spilled.restore()
    assert all(torch.equal(t, a) for t, a in zip(tensors, after, strict=True))


@pytest.mark.parametrize("most", [0, 200, 1 << 20])
def test_spilling_backward_changes_no_gradient(tmp_path: Path, most: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.SiLU(), torch.nn.LayerNorm(6), torch.nn.Linear(6, 2))
    x = torch.randn(3, 5, 4).transpose(0, 1)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with spilling_backward(tmp_path, list(model.parameters()), most):
        gradients = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_mapped_tables_keep_values_and_ties(tmp_path: Path) -> None:
    model = torch.nn.ModuleList(
        [torch.nn.Embedding(50, 8), torch.nn.Embedding(7, 3).bfloat16(), torch.nn.Linear(8, 50)]
    )
    model.requires_grad_(False)
    model[2].weight = model[0].weight  # type: ignore[assignment]
    before = [p.clone() for p in model.parameters()]
    tables = MappedTables(tmp_path, model)
    for _ in range(2):
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        tables.release()
    assert model[2].weight is model[0].weight
