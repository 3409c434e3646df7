"""Outputs of a large matrix are solved in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.blockwise.hessians import InputStatistics
from compress.blockwise.linears import TargetLinear
from compress.passes.cast.solve import Case, _alternated, _coupled, compensate_together, solve_matrix
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


@pytest.mark.parametrize("masked", [False, True])
def test_matrices_compensated_together_are_those_of_each_alone(masked: bool) -> None:
    torch.manual_seed(1)
    x, form = torch.randn(200, 48) @ torch.randn(48, 48), QuantFormat("int4", 16)
    statistics = InputStatistics(x.T @ x, tokens=200)
    cases = []
    for name, outputs in (("q", 48), ("k", 16), ("v", 16)):
        weight = torch.randn(outputs, 48)
        keep = torch.rand_like(weight) > 0.5 if masked else None
        cases.append(Case(TargetLinear(name, name, weight, False, torch.nn.Linear(1, 1)), form, keep, None))
    alone = [solve_matrix(case, statistics, None, False, {}, None) for case in cases]
    shared: dict[str, Any] = {}
    compensate_together(cases, statistics, None, shared)
    assert set(shared["compensated"]) == {"q", "k", "v"}
    for case, (codes, scales, row) in zip(cases, alone, strict=True):
        together = solve_matrix(case, statistics, None, False, shared, None)
        assert torch.equal(codes, together[0])
        torch.testing.assert_close(scales.scale, together[1].scale)
        assert together[2]["error"] == pytest.approx(row["error"])


def test_matrices_of_different_formats_or_masks_are_compensated_alone() -> None:
    statistics = InputStatistics(torch.eye(48), tokens=1)
    linears = [TargetLinear(name, name, torch.randn(16, 48), False, torch.nn.Linear(1, 1)) for name in "qk"]
    int4, int3 = QuantFormat("int4", 16), QuantFormat("int3", 16)
    for formats, masks in (((int4, int3), (None, None)), ((int4, int4), (None, torch.ones(16, 48, dtype=torch.bool)))):
        shared: dict[str, Any] = {}
        cases = [Case(*one, None) for one in zip(linears, formats, masks, strict=True)]
        compensate_together(cases, statistics, None, shared)
        assert not shared
