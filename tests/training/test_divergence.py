"""Divergences between predictions, against torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from compress.training.divergence import DIVERGENCES, bucketed, ensemble, skewed_kl


def two(seed=0, rows=5, buckets=11):
    lot = torch.Generator().manual_seed(seed)
    make = lambda: torch.randn(rows, buckets, generator=lot, dtype=torch.float64) * 2  # noqa: E731
    return make().log_softmax(-1), make().requires_grad_()


def test_divergences_match_torch():
    p, logits = two()
    q = logits.log_softmax(-1)
    kl = lambda a, b: functional.kl_div(b, a, reduction="none", log_target=True).sum(-1)  # noqa: E731
    middle = (0.5 * (p.exp() + q.exp())).log()
    expected = {
        "kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "skewed_kl": kl(p, (0.1 * p.exp() + 0.9 * q.exp()).log()),
        "js": 0.5 * kl(p, middle) + 0.5 * kl(q, middle),
    }
    assert DIVERGENCES.keys() == expected.keys()
    for name, function in DIVERGENCES.items():
        torch.testing.assert_close(function(p, q), expected[name])
        mine = torch.autograd.grad(function(p, q).sum(), logits, retain_graph=True)[0]
        theirs = torch.autograd.grad(expected[name].sum(), logits, retain_graph=True)[0]
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", [*DIVERGENCES, "skewed"])
def test_divergences_have_finite_gradients_at_zero_probability(name):
    logits = torch.randn(3, 4, requires_grad=True)
    teacher = torch.tensor([[0.5, 0.5, 0, 0]] * 3).log()
    student = torch.cat([logits, torch.full((3, 1), -math.inf)], 1).log_softmax(-1)
    if name == "reverse_kl":
        teacher = torch.tensor([[0.4, 0.4, 0.1, 0.1]] * 3).log()  # else it is infinite, and rightly so
    teacher = torch.cat([teacher, torch.full((3, 1), -math.inf)], 1)
    function = skewed_kl if name == "skewed" else DIVERGENCES[name]
    value = function(teacher, student).sum()
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


def test_bucketed_holds_the_rest_and_bounds_divergence_from_below():
    p, logits = two(rows=6, buckets=30)
    q = logits.log_softmax(-1)
    ids = p.topk(5).indices
    a, b = bucketed(p, ids), bucketed(q, ids)
    torch.testing.assert_close(a.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(a[:, -1].exp(), 1 - p.gather(1, ids).exp().sum(-1))
    # data processing: merging outcomes never raises a divergence
    assert (DIVERGENCES["kl"](a, b) <= DIVERGENCES["kl"](p, q) + 1e-12).all()
    every = p.topk(29).indices
    torch.testing.assert_close(DIVERGENCES["kl"](bucketed(p, every), bucketed(q, every)), DIVERGENCES["kl"](p, q))


def test_ensemble_is_the_mean_of_probabilities():
    (a, _), (b, _) = two(1), two(2)
    torch.testing.assert_close(ensemble([a, b], [0.25, 0.75]).exp(), 0.25 * a.exp() + 0.75 * b.exp())
