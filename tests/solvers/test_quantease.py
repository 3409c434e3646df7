"""Descent on codes and scales against its slow twin; weights corrected for drifted inputs against least squares."""

from __future__ import annotations

import pytest
import torch

from compress.solvers.gptq import act_order_factor, asymmetric_target, gptq, ridge_factor
from compress.solvers.hessian import damped
from compress.solvers.quant_format import Scales, code_range, fit, integer_codes
from compress.solvers.quantease import quantease
from compress.spec.formats import QuantFormat


def layer(outputs=6, inputs=24, tokens=200, seed=0):
    """Weights, and the inputs of correlated channels that they read."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) + 2 * torch.eye(inputs)
    return torch.randn(outputs, inputs, generator=generator), torch.randn(tokens, inputs, generator=generator) @ mix


def cost(W, codes, scales, H):
    """tr((W - Q) H (W - Q)ᵀ) by row, float64."""
    size = W.shape[1] // scales.shape[1]
    error = W.double() - codes.double() * scales.double().repeat_interleave(size, 1)
    return ((error @ H.double()) * error).sum(1)


def twin(W, codes, H, quant_format, scales, keep, rounds):
    """Every weight tries every code; every row's scales are solved from its tokens' outputs."""
    codes, scale = codes.double().clone(), scales.scale.double().clone()
    low, high = code_range(quant_format)
    groups = scale.shape[1]
    size = W.shape[1] // groups
    root = torch.linalg.cholesky(H.double())  # H = L Lᵀ: rows of Lᵀ are as good as tokens
    for _ in range(rounds):
        for o in range(len(W)):
            for i in range(W.shape[1]):
                if keep is not None and not keep[o, i]:
                    continue
                zero = 0.0 if scales.zero is None else float(scales.zero[o, i // size])
                tried = []
                for q in torch.arange(low, high + 1).double() - zero:
                    codes[o, i] = q
                    tried.append((float(cost(W[o : o + 1], codes[o : o + 1], scale[o : o + 1], H)), float(q)))
                codes[o, i] = min(tried)[1]
            columns = torch.stack(
                [root.T[:, g * size : (g + 1) * size] @ codes[o, g * size : (g + 1) * size] for g in range(groups)], 1
            )
            solved = torch.linalg.lstsq(columns, (root.T @ W[o].double())[:, None]).solution[:, 0]
            if ((solved / scale[o] > 0.5) & (solved / scale[o] < 2)).all():
                scale[o] = solved
    return codes, scale


@pytest.mark.parametrize(
    "quant_format", [QuantFormat("int3", 8), QuantFormat("int2", 0), QuantFormat("int3", 12, False)], ids=str
)
@pytest.mark.parametrize("pruned", [False, True])
def test_quantease_matches_slow_twin(quant_format, pruned):
    W, X = layer()
    H = damped((X.T @ X).double())[0].float()
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(3)) < 0.7 if pruned else None
    scales = fit(W, quant_format, H.diagonal(), keep)
    start = integer_codes(W, quant_format, scales, keep)
    codes, found = quantease(W, W, H, quant_format, scales, keep, rounds=2)
    wanted, scale = twin(W, start, H, quant_format, scales, keep, rounds=2)
    assert torch.equal(codes.double(), wanted)
    torch.testing.assert_close(found.scale.double(), scale, rtol=1e-3, atol=1e-5)
    assert found.zero is scales.zero
    assert (cost(W, codes, found.scale, H) < cost(W, start, scales.scale, H)).all()
    if keep is not None:
        assert (codes[~keep] == 0).all()


@pytest.mark.parametrize("format_", ["int4", "fp8", "mxfp4", "nvfp4"])
def test_quantease_never_raises_error(format_):
    W, X = layer(8, 64, 300)
    quant_format = QuantFormat(format_, {"int4": 16, "fp8": 0, "mxfp4": 32, "nvfp4": 16}[format_])
    H = (X.T @ X).double()
    scales = fit(W, quant_format, H.diagonal())
    order, factor, _ = act_order_factor(H)
    updated_weights = gptq(W, factor.float(), order, quant_format, scales)
    H = damped(H)[0].float()
    before = cost(W, integer_codes(updated_weights, quant_format, scales), scales.scale, H).sum()
    found = []
    for rounds in (0, 1, 3):
        codes, better = quantease(W, updated_weights, H, quant_format, scales, rounds=rounds)
        found.append(float(cost(W, codes, better.scale, H).sum()))
        assert torch.equal(
            codes,
            integer_codes(
                codes * better.scale.repeat_interleave(W.shape[1] // better.scale.shape[1], 1), quant_format, better
            ),
        )
    assert found[0] == pytest.approx(float(before))
    assert found[0] > found[1] >= found[2] * (1 - 1e-6)
    if format_ in ("mxfp4", "nvfp4"):
        assert torch.equal(better.scale, scales.scale)


def test_quantease_keeps_scales_of_empty_groups():
    W, X = layer(4, 16)
    W[:, :8] = 0
    scales = Scales(torch.ones(4, 2))
    codes, found = quantease(W, W, damped((X.T @ X).double())[0].float(), QuantFormat("int4", 8), scales, rounds=0)
    assert (codes[:, :8] == 0).all()
    keep = torch.ones_like(W, dtype=torch.bool)
    keep[:, :8] = False
    codes, found = quantease(W, W, damped((X.T @ X).double())[0].float(), QuantFormat("int4", 8), scales, keep)
    assert torch.isfinite(found.scale).all()
    assert (codes[:, :8] == 0).all()


@pytest.mark.parametrize("with_residual", [True, False])
def test_asymmetric_target_matches_least_squares(with_residual):
    W, now = layer(5, 12, 60)
    generator = torch.Generator().manual_seed(7)
    then = now + 0.3 * torch.randn(now.shape, generator=generator)
    r = 0.5 * torch.randn(60, 5, generator=generator).double() if with_residual else None
    W, now, then = W.double(), now.double(), then.double()
    H = now.T @ now
    L, ridge = ridge_factor(H, 0.3), 0.3
    pull = W @ (then - now).T @ now + (0 if r is None else r.T @ now)
    found = asymmetric_target(W, lambda rows: pull[rows], L)
    wanted = then @ W.T + (0 if r is None else r)
    # the ridge is a penalty on what V differs from W
    damp = (ridge * H.diagonal().mean()).sqrt() * torch.eye(12, dtype=torch.float64)
    left, right = torch.cat([now, damp]), torch.cat([wanted, damp @ W.T])
    torch.testing.assert_close(found, torch.linalg.lstsq(left, right).solution.T)
    assert torch.equal(asymmetric_target(W, lambda rows: torch.zeros_like(pull)[rows], L), W)
