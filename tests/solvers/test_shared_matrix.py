"""Sharing and low rank, against least squares and singular values written down plainly."""

from __future__ import annotations

import itertools

import pytest
import torch

from compress.solvers.low_rank import low_rank
from compress.solvers.shared_matrix import matching, pair_cost, partition, shared_matrix


def inputs(width, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return mix @ torch.randn(width, tokens, generator=generator, dtype=torch.float64)


def test_shared_matrix_matches_least_squares():
    torch.manual_seed(0)
    X = [inputs(8, 60, seed) for seed in range(3)]
    W = [torch.randn(5, 8, dtype=torch.float64) for _ in X]
    found, damping = shared_matrix(W, [x @ x.T for x in X], damp=1e-9)
    both = torch.cat(X, 1).T
    wanted = torch.linalg.lstsq(both, torch.cat([w @ x for w, x in zip(W, X, strict=True)], 1).T).solution.T
    assert torch.allclose(found, wanted, atol=1e-6)
    assert damping == 1e-9
    same = shared_matrix(W, [X[0] @ X[0].T] * 3)[0]
    assert torch.allclose(same, torch.stack(W).mean(0))  # of the same inputs it is the mean


@pytest.mark.parametrize(("outputs", "width"), [(6, 10), (10, 6), (7, 7)])
def test_low_rank_matches_whitened_svd(outputs, width):
    torch.manual_seed(1)
    W, X = torch.randn(outputs, width, dtype=torch.float64), inputs(width, 40, 2)
    H = X @ X.T
    L = torch.linalg.cholesky(H)  # SVD-LLM, algorithm 1
    U, S, V = torch.linalg.svd(W @ L)
    for rank in (1, 3, 6):
        wanted = (U[:, :rank] * S[:rank]) @ V[:rank] @ torch.linalg.inv(L)
        up, down, energies, damping = low_rank(W, H, rank)
        assert (up.shape, down.shape) == ((outputs, rank), (rank, width))
        error = float(((W - up @ down) @ X).square().sum())
        assert error == pytest.approx(float(((W - wanted) @ X).square().sum()), rel=1e-4, abs=1e-6)
        assert error == pytest.approx(float(energies[rank:].sum()), rel=1e-4, abs=1e-6)
        assert damping <= 1e-6
        assert torch.allclose(up.norm(dim=0), down.norm(dim=1))


def test_matching_and_partition_match_exhaustive_search():
    torch.manual_seed(2)
    likeness = torch.randn(5, 5, dtype=torch.float64)
    best = max(itertools.permutations(range(5)), key=lambda order: sum(likeness[i, j] for i, j in enumerate(order)))
    assert matching(likeness) == list(best)
    cost = torch.rand(6, 6)
    cost = (cost + cost.T).tolist()

    def total(groups):
        return sum(cost[i][j] for i in range(6) for j in range(i) if groups[i] == groups[j])

    every = set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    assert total(partition(cost, [[0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2]])) == pytest.approx(min(map(total, every)))


def test_pair_cost_matches_diagonal_statistics():
    torch.manual_seed(3)
    W, V, h, k = torch.randn(4, 3), torch.randn(4, 3), torch.rand(3) + 0.1, torch.rand(3) + 0.1
    shared = shared_matrix([W.double(), V.double()], [torch.diag(h).double(), torch.diag(k).double()], damp=1e-9)[0]
    error = float(((shared - W).square() @ h.double()).sum() + ((shared - V).square() @ k.double()).sum())
    assert pair_cost(W, V, h, k) == pytest.approx(error, rel=1e-6)
