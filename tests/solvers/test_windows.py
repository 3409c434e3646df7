"""Logits of sinks and the choice of windows, against slow searches."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from compress.solvers import knapsack
from compress.solvers.windows import NO_SINK, HeadProducts, choose, losses, noise, shrunk, sink_logits, total


def products(heads=4, tokens=50, seed=0):
    draw = torch.Generator().manual_seed(seed)
    kept = torch.randn(heads, tokens, generator=draw)
    mass = 2 * torch.randn(heads, tokens, generator=draw)
    true = torch.tensor([1.0, -1e4, 2.5, 0.0])
    sunk = 0.5 * torch.randn(heads, tokens, generator=draw)
    share = torch.sigmoid(mass - true[:, None])
    full = kept * share + sunk * (1 - share)  # a logit explains all of it
    return HeadProducts(full, kept, mass, true.clamp(min=0) + 0.5, sunk), true


def loss(p, logits, groups):
    """From the formula, token by token."""
    full, kept, mass, sunk = (x.tolist() for x in (p.full, p.kept, p.mass, p.sunk))
    result = 0.0
    for t in range(p.full.shape[1]):
        for heads in range(groups):
            size = len(logits) // groups
            change = 0.0
            for h in range(heads * size, heads * size + size):
                scale = 1 / (1 + math.exp(float(logits[h]) - mass[h][t]))
                change += kept[h][t] * scale + sunk[h][t] * (1 - scale) - full[h][t]
            result += change**2
    return result / 2 / p.full.shape[1]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sink_logits_find_the_logits_that_explain_what_was_lost(groups):
    p, true = products()
    logits = sink_logits(p, groups)
    assert torch.equal(logits, true)


@pytest.mark.parametrize("groups", [1, 2])
def test_sink_logits_are_best_one_by_one(groups):
    p, _ = products(seed=3)
    p = replace(p, full=p.full + torch.randn(p.full.shape, generator=torch.Generator().manual_seed(1)))
    logits = sink_logits(p, groups)
    reached = loss(p, logits, groups)
    assert reached < loss(p, torch.full((4,), NO_SINK), groups)
    for head in range(4):
        for other in [NO_SINK, *(p.start[head] + torch.arange(-6, 6.1, 0.25)).tolist()]:
            tried = logits.clone()
            tried[head] = other
            assert loss(p, tried, groups) >= reached * (1 - 1e-5)


def test_sink_logits_are_none_where_a_window_drops_nothing():
    p, _ = products()
    p = replace(p, start=torch.full((4,), -torch.inf))
    assert torch.equal(sink_logits(p, 2), torch.full((4,), NO_SINK))


def problem(seed, units=6, windows=2, tokens=30):
    draw = torch.Generator().manual_seed(seed)
    changes = torch.randn(units * windows, tokens, generator=draw)
    changes[::2] += changes[1] * torch.randn(units * windows // 2, 1, generator=draw)  # units that lose the same things
    costs = [[100, *sorted(torch.randint(1, 90, (windows,), generator=draw).tolist())] for _ in range(units)]
    return changes, costs


def joint_loss(changes, chosen, windows):
    rows = [changes[u * windows + option - 1] for u, option in enumerate(chosen) if option]
    return float(torch.stack(rows).sum(0).double().square().mean() / 2) if rows else 0.0


@pytest.mark.parametrize("seed", range(6))
def test_choose_lowers_the_loss_of_the_knapsack_and_holds_the_budget(seed):
    changes, costs = problem(seed)
    joint, budget = losses(changes, torch.ones(changes.shape[1])), 350
    chosen = choose(costs, joint, budget)
    alone = [[0.0, *(joint_loss(changes, [0] * u + [o], 2) for o in (1, 2))] for u in range(6)]
    start = knapsack.choose(costs, alone, budget)
    reached = joint_loss(changes, chosen, 2)
    assert total(joint, chosen, 3) == pytest.approx(reached)
    assert sum(row[o] for row, o in zip(costs, chosen, strict=True)) <= budget
    assert reached <= joint_loss(changes, start, 2) * (1 + 1e-9)
    for u, v in product(range(6), repeat=2):  # no exchange of two units is left
        for a, b in product(range(3), repeat=2):
            other = list(chosen)
            other[u], other[v] = a, b
            if sum(row[o] for row, o in zip(costs, other, strict=True)) <= budget:
                assert joint_loss(changes, other, 2) >= reached * (1 - 1e-6)


def test_choose_finds_the_best_of_all_choices():
    reached, best, knapsacks = 0.0, 0.0, 0.0
    for seed in range(8):
        changes, costs = problem(seed, units=5)
        joint = losses(changes, torch.ones(changes.shape[1]))
        every = [c for c in product(range(3), repeat=5) if sum(r[o] for r, o in zip(costs, c, strict=True)) <= 300]
        best += min(joint_loss(changes, c, 2) for c in every)
        reached += joint_loss(changes, choose(costs, joint, 300), 2)
        alone = joint.diagonal().view(5, 2)
        knapsacks += joint_loss(changes, knapsack.choose(costs, [[0.0, *row.tolist()] for row in alone], 300), 2)
    assert best <= reached < 1.1 * best
    assert reached < 0.9 * knapsacks


def test_choose_has_no_answer_below_the_least_cost():
    changes, costs = problem(0)
    assert choose(costs, losses(changes, torch.ones(30)), sum(min(row) for row in costs) - 1) is None


def test_losses_are_means_weighted_by_token_and_leave_padding_out():
    changes, counts = torch.randn(3, 10), torch.tensor([1.0] * 6 + [4.0] * 3 + [0.0])
    joint = losses(changes, counts)
    for u, v in product(range(3), repeat=2):
        assert float(joint[u, v]) == pytest.approx(
            sum(float(c * a * b) for c, a, b in zip(counts, changes[u], changes[v], strict=True)) / 2 / 18, abs=1e-6
        )


def test_noise_is_the_variance_of_a_weighted_mean():
    changes, counts = torch.randn(2, 12), torch.tensor([1.0] * 6 + [4.0] * 4 + [0.0] * 2)
    terms = counts[:10] * changes[0, :10] * changes[1, :10] / 2 / counts.sum()
    assert float(noise(changes, counts)[0, 1]) == pytest.approx(10 * float(terms.var()), rel=1e-5)


def test_pairs_are_shrunk_as_far_as_they_are_noise():
    draw = torch.Generator().manual_seed(0)
    counts = torch.ones(4000)
    alone = torch.randn(24, 4000, generator=draw)
    alike = alone + 2 * torch.randn(1, 4000, generator=draw)
    for changes, least, most in ((alone, 0.7, 1.0), (alike, 0.0, 0.01)):
        joint = losses(changes, counts)
        result = shrunk(joint, noise(changes, counts), 2)
        same = torch.arange(24)[:, None] // 2 == torch.arange(24) // 2
        assert torch.equal(result[same], joint[same])  # two windows of one unit
        kept = result[~same] / joint[~same]
        assert torch.allclose(kept, kept[:1])
        assert least <= 1 - float(kept[0]) <= most
