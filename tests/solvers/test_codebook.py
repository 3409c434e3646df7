"""Codebooks: no clustering is better on few values, Lloyd's never makes one worse, few values are kept, GPTQ pays."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.solvers import codebook as solver
from compress.solvers.codebook import codebook, rounded, to_codes
from compress.solvers.gptq import act_order_factor, codebook_gptq, gptq
from compress.solvers.quant_format import dequantize


def error(W, book, importance=None, keep=None):
    """Σ h (w - w')², every weight with the nearest of all values."""
    distance = (W.double()[..., None] - book.double()).square().min(-1).values
    h = torch.ones(W.shape[-1]).double() if importance is None else importance.double()
    return float((distance * h * (1 if keep is None else keep)).sum())


def lloyd(W, book, importance=None, rounds=80):
    """Full assignments by argmin and means, the error of each round."""
    x = W.double().flatten()
    h = torch.ones_like(x) if importance is None else importance.double().expand(W.shape).flatten()
    errors = []
    for _ in range(rounds):
        distance = (x[:, None] - book).square()
        nearest = distance.argmin(1)
        errors.append(float((h * distance.gather(1, nearest[:, None])[:, 0]).sum()))
        for k in range(len(book)):
            if (mine := nearest == k).any():
                book[k] = (h * x)[mine].sum() / h[mine].sum()
    return book.sort().values, errors


def best_of_all(x, h, K):
    """Least error of any division of sorted values into K runs."""
    least = math.inf
    for cuts in itertools.combinations(range(1, len(x)), K - 1):
        total = 0.0
        for i, j in itertools.pairwise((0, *cuts, len(x))):
            mean = (h[i:j] * x[i:j]).sum() / h[i:j].sum()
            total += (h[i:j] * (x[i:j] - mean) ** 2).sum()
        least = min(least, total)
    return least


@given(st.integers(5, 11), st.booleans(), st.integers(0, 10_000))
def test_codebook_matches_best_division_of_few_values(count, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(count, generator=generator)
    h = torch.rand(count, generator=generator) + 0.1 if weighted else None
    order = W.argsort()
    heights = np.ones(count) if h is None else h[order].double().numpy()
    best = best_of_all(W[order].double().numpy(), heights, 4)
    assert error(W, codebook(W, 2, h), h) == pytest.approx(best, rel=1e-4, abs=1e-12)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.integers(2, 6), st.sampled_from(["normal", "heavy", "outlier"]), st.booleans(), st.integers(0, 10_000))
def test_codebook_beats_lloyd_from_same_and_uniform_start(bits, kind, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(30, 40, generator=generator)
    if kind == "heavy":
        W = W / torch.rand(30, 40, generator=generator).clamp(min=1e-3)
    if kind == "outlier":
        W[3, 5] = 1e6
    h = torch.rand(40, generator=generator).square() if weighted else None
    book = codebook(W, bits, h)
    assert torch.equal(book, book.sort().values)
    linear = torch.linspace(float(W.min()), float(W.max()), 1 << bits, dtype=torch.float64)
    _, errors = lloyd(W, linear, h)
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    mine = error(W, book, h)
    assert mine <= errors[-1] * (1 + 1e-3)
    # nothing is left to gain for the twin but what bins of the histogram hide
    assert lloyd(W, book.clone(), h, 20)[1][-1] >= mine * (1 - 1e-3)


def test_rounds_never_raise_codebook_error(monkeypatch):
    W = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    x, h = solver._histogram(W, None, None)
    book, before = np.linspace(x[0], x[-1], 16), math.inf
    monkeypatch.setattr(solver, "_ROUNDS", 1)
    for _ in range(60):
        now = error(torch.from_numpy(x), torch.from_numpy(book), torch.from_numpy(h))
        assert now <= before * (1 + 1e-12)
        before, book = now, solver._lloyd(x, h, book)


@pytest.mark.slow
def test_merging_first_keeps_codebook_error(monkeypatch):
    W = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        whole = error(W, codebook(W, bits))
        monkeypatch.setattr(solver, "_MERGED", 1024)
        assert error(W, codebook(W, bits)) <= whole * 1.01
        monkeypatch.undo()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounded_keeps_values_when_they_fit_the_codebook(dtype):
    generator = torch.Generator().manual_seed(0)
    values = (1 + torch.randn(13, generator=generator, dtype=torch.float64) * 1e-6).to(
        dtype
    )  # one bin of the histogram
    W = values[torch.randint(len(values), (50, 40), generator=generator)]
    codes = rounded(W, 4, dtype, torch.rand(40, generator=generator))
    assert codes.scale.dtype == dtype
    assert torch.equal(dequantize(codes), W)
    keep = torch.rand(W.shape, generator=generator) < 0.5
    noise = torch.where(keep, W, torch.randn(W.shape, generator=generator).to(dtype))
    assert torch.equal(dequantize(rounded(noise, 4, dtype, None, keep), keep), torch.where(keep, W, 0))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (3, 5, 7), (6,)])
def test_rounded_takes_any_shape(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes = rounded(W, 8, torch.float32)
    assert codes.codes.shape == W.shape
    assert torch.equal(dequantize(codes), W)
    assert not dequantize(rounded(W, 2, torch.float32, None, torch.zeros(shape, dtype=torch.bool))).any()


def test_to_codes_picks_nearest_values():
    W = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    book = codebook(W, 4).bfloat16()
    found = dequantize(to_codes(W, book))
    assert found.dtype == torch.bfloat16
    distance = (W[..., None].double() - book.double()).abs()
    assert torch.equal((W.double() - found.double()).abs(), distance.min(-1).values)


def test_rounded_does_not_depend_on_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    W, h = torch.randn(64, 33, generator=generator), torch.rand(33, generator=generator)
    keep = torch.rand(W.shape, generator=generator) < 0.7
    whole = rounded(W, 4, torch.float32, h, keep)
    monkeypatch.setattr(solver, "_AT_ONCE", 100)
    parts = rounded(W, 4, torch.float32, h, keep)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)


def layer(seed=0, outputs=64, inputs=96):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.randn(inputs, generator=generator).exp()[:, None]
    X = torch.randn(2000, inputs, generator=generator) @ mix
    return torch.randn(outputs, inputs, generator=generator), (X.T @ X).double()


def output_error(W, found, H):
    difference = (W - found).double()
    return float(((difference @ H) * difference).sum())


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_importance_and_codebook_gptq_lower_output_error(share):
    W, H = layer()
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < share
    W = W * keep
    order, factor, _ = act_order_factor(H)
    for bits in (2, 4):
        book = codebook(W, bits, H.diagonal(), keep).float()
        plain = dequantize(rounded(W, bits, torch.float32, None, keep), keep)
        weighted = dequantize(to_codes(W, book, keep), keep)
        updated_weights = codebook_gptq(W, factor.float(), order, book, keep)
        solved = dequantize(to_codes(updated_weights, book, keep), keep)
        assert output_error(W, weighted, H.diagonal().diag()) < output_error(W, plain, H.diagonal().diag())
        assert output_error(W, solved, H) < 0.6 * output_error(W, weighted, H)
        assert not solved[~keep].any()


def test_codebook_gptq_matches_gptq_of_the_same_grid():
    from compress.solvers.quant_format import Scales
    from compress.spec.formats import QuantFormat

    W, H = layer(1)
    order, factor, _ = act_order_factor(H)
    book = torch.arange(-8, 8) * 0.25
    quant_format = gptq(W, factor.float(), order, QuantFormat("int4"), Scales(torch.full((len(W), 1), 0.25)))
    assert torch.equal(codebook_gptq(W, factor.float(), order, book), quant_format)
