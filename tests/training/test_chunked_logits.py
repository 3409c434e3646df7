"""A loss summed by chunks has the value and gradients of the whole."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compress.training.chunked_logits import summed


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("kind", ["linear", "any"])
def test_summed_matches_value_and_gradients_of_the_whole(rows, kind):
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 50)
    hidden = torch.randn(10, 6, requires_grad=True)
    targets = torch.randint(0, 50, (10,))
    head = linear if kind == "linear" else lambda h: linear(h).tanh() * 3

    def loss(logits, part):
        found = functional.cross_entropy(logits, targets[part], reduction="sum")
        return torch.stack([found, found.detach() * 2])

    parameters = list(linear.parameters())
    sums = summed(loss, head, hidden, parameters, rows, factor=0.25, scale=128.0)
    mine = torch.autograd.grad(sums[0] * 3, [hidden, *parameters])
    whole = functional.cross_entropy(head(hidden), targets, reduction="sum") / 4
    theirs = torch.autograd.grad(whole * 3, [hidden, *parameters])
    torch.testing.assert_close(sums, torch.stack([whole, whole * 2]))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(summed(loss, head, hidden, parameters, rows, factor=0.25), sums)
