"""Codes and scales in view of the curvature by outputs: what they lower, that nothing single is left to gain, and where they stay."""

from __future__ import annotations

import itertools

import pytest
import torch

from compress.solvers.gptq import act_order_factor, gptq
from compress.solvers.hessian import damped
from compress.solvers.quant_format import Scales, code_range, fit, integer_codes
from compress.solvers.quantease import quantease
from compress.solvers.yaqa import _compatible_steps, gptq_kronecker, kronecker_error, refitted, shrunk, yaqa
from compress.spec.formats import QuantFormat
from tests.solvers.test_quantease import layer


def curvature(outputs, seed=0):
    """Of outputs that hang together."""
    G = torch.randn(4 * outputs, outputs, generator=torch.Generator().manual_seed(seed + 10))
    return shrunk((lambda X: X.T @ X)(G @ (torch.eye(outputs) + torch.ones(outputs, outputs) / 3)), 0.05)


def cost(W, codes, scales, H, F):
    """tr(F E H Eᵀ), float64."""
    error = W.double() - codes.double() * scales.scale.double().repeat_interleave(
        W.shape[1] // scales.scale.shape[1], 1
    )
    return float(((F.double() @ error @ H.double()) * error).sum())


def start(quant_format, pruned=False, outputs=7):
    W, X = layer(outputs)
    H = damped((X.T @ X).double())[0].float()
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(3)) < 0.7 if pruned else None
    scales = fit(W, quant_format, H.diagonal(), keep)
    codes, scales = quantease(W, W, H, quant_format, scales, keep, rounds=3)
    return W, H, keep, codes, scales


GRIDS = [
    QuantFormat("int3", 8),
    QuantFormat("int2", 0),
    QuantFormat("int3", 12, False),
    QuantFormat("mxfp4", 8),
    QuantFormat("fp8", 0),
]


@pytest.mark.parametrize("quant_format", GRIDS, ids=str)
@pytest.mark.parametrize("pruned", [False, True])
def test_yaqa_lowers_error_until_no_single_code_helps(quant_format, pruned):
    W, H, keep, codes, scales = start(quant_format, pruned)
    F = curvature(len(W))
    costs = [cost(W, codes, scales, H, F)]
    given = codes.clone()
    for _ in range(24):
        codes, scales = yaqa(W, codes, H, F, quant_format, scales, keep, rounds=1)
        costs.append(cost(W, codes, scales, H, F))
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(costs)), costs
    assert costs[-1] < 0.97 * costs[0] or quant_format.format == "fp8"
    assert not torch.equal(codes, given)
    if keep is not None:
        assert (codes[~keep] == 0).all()
    if quant_format.is_integer:
        low, high = code_range(quant_format)
        zero = torch.zeros_like(codes) if scales.zero is None else scales.zero.repeat_interleave(quant_format.group, 1)
        stored = codes + zero
        assert (stored == stored.round()).all()
        assert low <= stored[keep if keep is not None else ...].min() <= stored.max() <= high
        for o, i, step in itertools.product(range(len(W)), range(W.shape[1]), (-1, 1)):
            if low <= stored[o, i] + step <= high and (keep is None or keep[o, i]):
                other = codes.clone()
                other[o, i] += step
                assert cost(W, other, scales, H, F) >= costs[-1] * (1 - 1e-5), (o, i, step)
    else:
        values = codes * scales.scale.repeat_interleave(quant_format.group or W.shape[1], 1)
        assert torch.equal(codes, integer_codes(values, quant_format, scales))


@pytest.mark.parametrize("quant_format", GRIDS, ids=str)
def test_refitted_scales_lower_error_as_far_as_they_go(quant_format):
    W, H, _, codes, scales = start(quant_format)
    F = curvature(len(W))
    before = cost(W, codes, scales, H, F)
    found = refitted(W, codes, H, F, quant_format, scales)
    assert found.zero is scales.zero
    if quant_format.format == "mxfp4":
        assert found is scales
        return
    assert cost(W, codes, found, H, F) < before
    for share in (-0.1, 0.1):  # along the way it went, no other place is better
        other = found._replace(scale=found.scale + share * (found.scale - scales.scale))
        assert cost(W, codes, other, H, F) >= cost(W, codes, found, H, F) * (1 - 1e-6)


def rounded_in_order(W, H, F, order_I, quant_format, scales, keep, together):
    """GPTQ on the whole matrix as one vector, by input and in each by groups of outputs, with the Kronecker product itself."""
    order_O = torch.argsort(F.diagonal(), descending=True, stable=True)
    outputs, size = len(W), W.shape[1] // scales.scale.shape[1]
    whole = torch.kron(H[order_I][:, order_I].double(), F[order_O][:, order_O].double())
    U = torch.linalg.cholesky(torch.linalg.inv(whole)).T
    low, high = code_range(quant_format)
    left = W.t()[order_I][:, order_O].double().flatten().clone()
    codes = torch.zeros_like(W)
    for begin in (i * outputs + o for i in range(W.shape[1]) for o in range(0, outputs, together)):
        end = min(begin + together, (begin // outputs + 1) * outputs)
        errors = torch.zeros(end - begin, dtype=torch.float64)
        for k in range(begin, end):
            i, o = int(order_I[k // outputs]), int(order_O[k % outputs])
            scale = float(scales.scale[o, i // size])
            zero = 0.0 if scales.zero is None else float(scales.zero[o, i // size])
            code = min(max(round(float(left[k]) / scale + zero), low), high) - zero
            codes[o, i] = code if keep is None or keep[o, i] else 0.0
            errors[k - begin] = left[k] - float(codes[o, i]) * scale
        left[end:] -= errors @ torch.linalg.inv(U[begin:end, begin:end]) @ U[begin:end, end:]
    return codes


@pytest.mark.parametrize(
    "quant_format", [QuantFormat("int3", 8), QuantFormat("int4", 12, False), QuantFormat("int2", 0)], ids=str
)
@pytest.mark.parametrize(
    ("outputs", "inputs", "together"),
    [
        (7, 24, 1),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((40, 24, 1), (33, 48, 4), (40, 24, 8))),
        (5, 72, 8),
    ],
)
@pytest.mark.parametrize("pruned", [False, True])
def test_gptq_kronecker_matches_gptq_on_full_product(quant_format, outputs, inputs, together, pruned):
    W, X = layer(outputs, inputs)
    H = damped((X.T @ X).double())[0]
    F = curvature(outputs)
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(3)) < 0.7 if pruned else None
    scales = fit(W, quant_format, H.diagonal(), keep)
    order, U, _ = act_order_factor(H, 0.0)
    double = Scales(*(t if t is None else t.double() for t in scales))
    found = gptq_kronecker(W.double(), U, order, F.double(), quant_format, double, keep, together)
    wanted = rounded_in_order(W, H, F, order, quant_format, scales, keep, together)
    assert (found != wanted).float().mean() <= 0.002
    if keep is not None:
        assert (found[~keep] == 0).all()
    plain = integer_codes(gptq(W, U.float(), order, quant_format, scales, keep), quant_format, scales, keep)
    error = kronecker_error(W, found.float(), scales, H.float(), F)
    assert error == pytest.approx(cost(W, found, scales, H, F), rel=1e-3)
    worst = kronecker_error(W, plain, scales, H.float(), F)
    assert error < worst or (together >= outputs and error < worst * 1.001)


def test_yaqa_keeps_quantease_codes_when_outputs_are_uncorrelated():
    quant_format = QuantFormat("int3", 8)
    W, X = layer(6)
    H = damped((X.T @ X).double())[0].float()
    codes, scales = quantease(W, W, H, quant_format, fit(W, quant_format, H.diagonal()), rounds=60)
    found, moved = yaqa(W, codes, H, torch.eye(6) * 3, quant_format, scales)
    assert torch.equal(found, codes)
    torch.testing.assert_close(moved.scale, scales.scale, rtol=1e-3, atol=1e-6)


def test_shrunk_keeps_only_steps_that_help():
    """What is kept lowers the sum, and leaving out any one of it does not lower it more."""
    generator = torch.Generator().manual_seed(0)
    dropped = 0
    for trial in range(50):
        F = curvature(6, trial)
        slope = torch.randn(6, generator=generator)

        def change(step, at, F=F, slope=slope):
            return 0.5 * float(step @ F[at][:, at] @ step) - 2 * float(slope[at] @ step)

        best = 2 * slope / F.diagonal()  # what each output alone would like
        at = torch.arange(6)
        kept, step = _compatible_steps(at, best, slope, 0.5, F)
        dropped += 6 - len(kept)
        assert len(kept)
        assert torch.equal(step, best[kept])
        assert change(step, kept) < 0
        for k in range(len(kept)):
            rest = torch.arange(len(kept)) != k
            assert change(step[rest], kept[rest]) >= change(step, kept) - 1e-5
    assert dropped


def test_shrunk_takes_zero_curvature():
    assert torch.equal(shrunk(torch.zeros(3, 3), 0.05), 0.05 * torch.eye(3))
