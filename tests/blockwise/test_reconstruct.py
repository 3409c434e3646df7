"""Block reconstruction: products in bfloat16 where the machine has units for them."""

from __future__ import annotations

import pytest
import torch

from compress.blockwise import reconstruct
from compress.checkpoint.open import open_checkpoint
from tests import pico
from tests.toolbox import apply


def tuned(folder, data, work):
    """Tuned weights of a pruned block by name, and the held-out error before and after."""
    details: dict = {}
    pruned = apply(
        open_checkpoint(folder), "prune_unstructured", data=data, work=work, details=details, method="wanda", sparsity=0.5,
        only=["re:.*layers.0.*_proj"], reconstruction_epochs=1,
    )  # fmt: skip
    tensors = {t.name: pruned.tensor(t.name) for t in pruned.spec.stored() if t.kept is not None}
    return tensors, details["blocks"][0]["tuning"]


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_training_in_bfloat16_lowers_the_error_as_much(family, data, tmp_path, monkeypatch):
    folder = pico.folder(family)
    monkeypatch.setattr(reconstruct, "_NARROW", 1)
    results = []
    for units in (False, True):
        monkeypatch.setattr(reconstruct, "_has_units", lambda device, units=units: units)
        results.append(tuned(folder, data, tmp_path / str(units)))
    (exact, full), (near, reduced) = results
    assert reduced["before"] == full["before"]
    assert full["before"] - reduced["after"] == pytest.approx(full["before"] - full["after"], rel=0.1)
    assert any(not torch.equal(exact[name].data, near[name].data) for name in exact)
    assert all(torch.equal(exact[name].mask, near[name].mask) for name in exact)


def test_narrow_blocks_and_code_of_one_dtype_stay_in_float32(data, tmp_path, monkeypatch):
    folder = pico.folder("llama")
    monkeypatch.setattr(reconstruct, "_has_units", lambda device: True)
    narrow, _ = tuned(folder, data, tmp_path / "narrow")
    monkeypatch.setattr(reconstruct, "_NARROW", 1)

    def strict(module, args, output):
        if isinstance(module, torch.nn.Linear) and output.dtype != torch.float32:
            raise RuntimeError("expected float32")

    handle = torch.nn.modules.module.register_module_forward_hook(strict)
    try:
        kept, _ = tuned(folder, data, tmp_path / "strict")
    finally:
        handle.remove()
    assert all(torch.equal(narrow[name].data, kept[name].data) for name in narrow)
