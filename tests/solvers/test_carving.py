"""Experts out of neurons, against slow and obvious twins."""

import itertools

import pytest
import torch

from compress.solvers.carving import SPREAD, balanced, carve, chosen, clusters, fit_router, flat, solve_down


def planted(tokens=512, groups=4, size=6, shared=5, seed=0):
    """Inputs, activations and a down projection: each token excites all shared neurons and those of one group."""
    g = torch.Generator().manual_seed(seed)
    group = torch.randint(0, groups, (tokens,), generator=g)
    x = torch.nn.functional.one_hot(group, groups).float() + 0.05 * torch.randn(tokens, groups, generator=g)
    order = torch.randperm(shared + groups * size, generator=g)
    owner = torch.cat([torch.full((shared,), -1), torch.arange(groups).repeat_interleave(size)])[order]
    h = torch.randn(tokens, len(owner), generator=g)
    h = h * ((owner[None] == group[:, None]) | (owner == -1)[None]) + 0.01 * torch.randn(h.shape, generator=g)
    W = torch.nn.functional.normalize(torch.randn(64, len(owner), generator=g), dim=0)
    return x, h, W, owner, group


def test_carve_finds_planted_experts():
    x, h, W, owner, group = planted()
    made = carve(x, h, W, (h.T @ h).double(), count=4, size=6, active=1, seed=0)
    assert torch.equal(made.expert_A == -1, owner == -1)
    pairs = {(int(a), int(b)) for a, b in zip(made.expert_A, owner, strict=True) if b >= 0}
    assert len(pairs) == 4
    names = dict(pairs)
    picked = (x @ made.router_EI.T).argmax(1).apply_(names.get)
    assert float((picked == group).double().mean()) > 0.99
    assert float((x @ made.router_EI.T).std()) == pytest.approx(SPREAD, rel=1e-4)


def test_carve_repeats_itself():
    x, h, W, _, _ = planted()
    first, second = (carve(x, h, W, (h.T @ h).double(), count=4, size=6, active=2, seed=3) for _ in range(2))
    assert torch.equal(first.expert_A, second.expert_A)
    assert torch.equal(first.router_EI, second.router_EI)


@pytest.mark.parametrize("seed", range(8))
def test_balanced_is_near_the_optimum_of_all_divisions(seed):
    """All ways to put 6 neurons into 3 groups of 2."""
    benefit = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)).double()
    group = balanced(benefit, 2)
    assert group.bincount().tolist() == [2, 2, 2]
    total = float(benefit.gather(0, group[None]).sum())
    every = set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    sums = sorted(sum(float(benefit[e, n]) for n, e in enumerate(g)) for g in every)
    assert total >= sums[-1] - 0.15 * (sums[-1] - sums[len(sums) // 2])
    for a, b in itertools.combinations(range(6), 2):  # no exchange of two neurons helps
        swapped = group.clone()
        swapped[[a, b]] = group[[b, a]]
        assert float(benefit.gather(0, swapped[None]).sum()) <= total + 1e-9


def test_clusters_are_neurons_of_the_same_tokens():
    _, h, _, owner, _ = planted(shared=0)
    group = clusters(h.square(), 4, 6, 0)
    assert len({(int(a), int(b)) for a, b in zip(group, owner, strict=True)}) == 4


@pytest.mark.slow
def test_router_learns_the_shares():
    """Near the loss of a plain descent with all tokens in every step."""
    g = torch.Generator().manual_seed(0)
    x, truth = torch.randn(2048, 12, generator=g), torch.randn(5, 12, generator=g)
    share = (x @ truth.T).softmax(1)

    def loss(router):
        return float(-(share * (x @ router.T).log_softmax(1)).sum(1).mean())

    slow = torch.zeros(5, 12)
    for _ in range(1500):
        slow -= 0.5 * ((x @ slow.T).softmax(1) - share).T @ x / len(x)
    assert loss(fit_router(x, share * 7, None, 150, 0)) < loss(slow) + 0.02


def test_flat_routers_choose_alike():
    g = torch.Generator().manual_seed(0)
    x, router = torch.randn(256, 12, generator=g), torch.randn(5, 12, generator=g)
    assert torch.equal(chosen(x @ flat(router, x, SPREAD).T, 2), chosen(x @ router.T, 2))


def test_solve_down_matches_ridge_regression():
    """A regression on all tokens, with λ as rows of their own."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(400, 9, generator=g).double() @ torch.randn(9, 9, generator=g).double()
    m = h * (torch.rand(400, 9, generator=g) > 0.4)
    W = torch.randn(4, 9, generator=g).double()
    cross, gram = h.T @ m, m.T @ m
    damp = (1e-3 * gram.diagonal().mean()).sqrt()
    rows, targets = torch.cat([m, damp * torch.eye(9)]), torch.cat([h @ W.T, damp * W.T])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(solve_down(W, cross, gram), expected)
    nothing = torch.zeros(9, 9).double()
    torch.testing.assert_close(solve_down(W, nothing, nothing), W)
    with pytest.raises(ValueError, match="NaN or infinite"):
        solve_down(W, cross, gram * torch.nan)
