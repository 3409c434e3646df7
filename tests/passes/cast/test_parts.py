"""Outputs of a large matrix are solved in parts."""

from __future__ import annotations

import pytest
import torch

from compress.passes.cast.block import _alternated, _coupled
from compress.solvers import memory
from compress.solvers.gptq import act_order_factor
from compress.solvers.quant_format import Scales, fit
from compress.solvers.yaqa import kronecker_error, shrunk
from compress.spec.formats import QuantFormat


def test_parts_of_a_matrix_lower_the_same_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    form, mixed = QuantFormat("int3", 16, False), torch.randn(48, 48)
    weight, x, g = torch.randn(40, 48), torch.randn(200, 48) @ mixed, torch.randn(300, 40) @ torch.randn(40, 40)
    H = x.T @ x
    H.diagonal().add_(0.01 * float(H.diagonal().mean()))
    order, factor, _ = act_order_factor(H)
    F = shrunk(g.T @ g)
    scales = fit(weight, form, H.diagonal(), None)

    def solved() -> tuple[torch.Tensor, Scales, float, float]:
        codes, fitted = _alternated(weight, weight, H, form, scales, None, 2)
        before = kronecker_error(weight, codes.float(), fitted, H, F)
        start = codes.clone()
        shared = {"factor": factor, "order": order}
        codes, coupled = _coupled(
            weight, codes, H, shared, F, form, fitted._replace(scale=fitted.scale.clone()), None, True
        )
        return start, fitted, before, kronecker_error(weight, codes.float(), coupled, H, F)

    whole, scales_whole, before, after = solved()
    monkeypatch.setattr(memory, "WEIGHTS_AT_ONCE", 48 * 15)
    parts, scales_parts, before_parts, after_parts = solved()
    assert parts.dtype == torch.int8
    assert torch.equal(whole, parts)
    torch.testing.assert_close(scales_whole.scale, scales_parts.scale)
    assert after < before
    assert after_parts < 0.9 * before_parts
    assert after_parts < 1.15 * after
