"""Outputs of a large matrix are solved in parts, small matrices together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.blockwise.hessians import InputStatistics
from compress.blockwise.linears import TargetLinear
from compress.checkpoint.open import open_checkpoint
from compress.passes.cast import solve as cast_solve
from compress.passes.cast.solve import Case, CaseGroup, _alternated, _coupled, compensate_together, solve_matrix
from compress.solvers import memory
from compress.solvers.gptq import act_order_factor, gptq, gptq_batch
from compress.solvers.quant_format import Scales, fit, integer_codes
from compress.solvers.yaqa import kronecker_error, shrunk
from compress.spec.formats import QuantFormat
from tests.toolbox import apply, write


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
    compensate_together([CaseGroup(cases, statistics, None, shared)])
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
        compensate_together([CaseGroup(cases, statistics, None, shared)])
        assert not shared


@pytest.mark.parametrize(
    "form", [QuantFormat("int4", 16), QuantFormat("int3", 16, False), QuantFormat("fp8"), QuantFormat("mxfp4", 32)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_gptq_of_several_matrices_is_that_of_each(form: QuantFormat, masked: bool) -> None:
    torch.manual_seed(2)
    W_EOI = torch.randn(3, 24, 160)
    keep_EOI = torch.rand_like(W_EOI) > 0.5 if masked else None
    alone, orders, factors, scales = [], [], [], []
    for e, W_OI in enumerate(W_EOI):
        x = torch.randn(400, 160) @ torch.randn(160, 160)
        order, factor, _ = act_order_factor(x.T @ x)
        keep = None if keep_EOI is None else keep_EOI[e]
        scales.append(fit(W_OI, form, None, keep))
        alone.append(gptq(W_OI, factor, order, form, scales[-1], keep))
        orders.append(order)
        factors.append(factor)
    zeros = [each.zero for each in scales if each.zero is not None]
    together = Scales(torch.stack([each.scale for each in scales]), torch.stack(zeros) if zeros else None)
    result = gptq_batch(W_EOI, torch.stack(factors), torch.stack(orders), form, together, keep_EOI)
    for one, many, each, keep in zip(alone, result, scales, keep_EOI if masked else [None] * 3, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)
        differ = integer_codes(one, form, each, keep) != integer_codes(many, form, each, keep)
        assert float(differ.float().mean()) < 0.001


@pytest.mark.slow
def test_experts_rounded_together_are_those_of_each_alone(
    folders: dict[str, Path], data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def counted(W_EOI: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts.append(len(W_EOI))
        return gptq_batch(W_EOI, *rest)

    monkeypatch.setattr(cast_solve, "gptq_batch", counted)
    checkpoint = open_checkpoint(folders["qwen3_moe"])
    settings = {"weights": "int4", "group_size": 16, "effort": "fast"}

    def cast(out: str) -> dict[str, torch.Tensor]:
        stored = write(apply(checkpoint, "cast", data=data, work=tmp_path / f"{out}-work", **settings), tmp_path / out)
        return {name: tensor for file in stored.files for name, tensor in load_file(stored.folder / file).items()}

    together = cast("together")
    assert max(counts) > 1
    monkeypatch.setattr(cast_solve, "_EXPERTS", ((0, 0), (0, 0)))
    counts.clear()
    alone = cast("alone")
    assert not counts
    assert together.keys() == alone.keys()
    # sums of products are rounded otherwise, which flips a code here and there, and later blocks follow
    first = [name for name in together if "layers.0" in name or "layers.1" in name]
    assert any("experts" in name for name in first)
    for name in first:
        differ = together[name] != alone[name]
        assert float(differ.float().mean()) <= 0.02, name
