"""Matrices that the class splits or joins on loading, so that calibration does not reach them: treated by their weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compress
from compress.checkpoint.open import open_checkpoint
from compress.errors import PassError
from compress.models.pico import pico_model
from compress.models.shrink import default_config, shrunken
from tests.toolbox import our_logits, stock_logits

PRUNE: dict[str, Any] = {"sparsity": 0.5}
IDS = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lara(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lara")
    config = shrunken(default_config("lara_mini"))
    pico_model(transformers.LaraMiniForCausalLM, config, seed=3).save_pretrained(folder)
    return folder


def changed(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """The tensors of ``out`` that differ from those of ``folder``, by name."""
    before, after = open_checkpoint(folder), open_checkpoint(out)
    values = {t.name: after.tensor(t.name).data for t in after.spec.stored()}
    return {n: v for n, v in values.items() if not torch.equal(v, before.tensor(n).data)}


@pytest.mark.slow
def test_joined_matrices_are_pruned_by_magnitude_and_the_rest_by_calibration(lara, tmp_path):
    settings = {"method": "sparsegpt", "reconstruction_epochs": 1, **PRUNE}
    compress.apply("prune_unstructured", lara, tmp_path / "out", data=IDS, **settings)
    compress.apply("prune_unstructured", lara, tmp_path / "magnitude", method="magnitude", **PRUNE)
    ours, theirs = changed(lara, tmp_path / "out"), changed(lara, tmp_path / "magnitude")
    joined = [n for n in theirs if n.endswith("linear_attn.in_proj.weight")]
    assert joined
    assert all(torch.equal(ours[n], theirs[n]) for n in joined)
    assert all((ours[n] == 0).sum() == (theirs[n] == 0).sum() for n in theirs)
    assert not any(torch.equal(ours[n], theirs[n]) for n in theirs if n not in joined)
    assert torch.equal(stock_logits(tmp_path / "out", tmp_path), our_logits(tmp_path / "out"))


@pytest.mark.slow
def test_experts_of_two_numbers_are_pruned_by_magnitude(tmp_path):
    """LongCat has experts that hand on their inputs: their gates and ups have weights, which nothing reads."""
    model = tmp_path / "model"
    pico_model(transformers.LongcatFlashForCausalLM, shrunken(default_config("longcat_flash"))).save_pretrained(model)
    settings = {"method": "sparsegpt", "reconstruction_epochs": 0, **PRUNE}
    compress.apply("prune_unstructured", model, tmp_path / "out", data=IDS, **settings)
    compress.apply("prune_unstructured", model, tmp_path / "magnitude", method="magnitude", **PRUNE)
    ours, theirs = changed(model, tmp_path / "out"), changed(model, tmp_path / "magnitude")
    assert ours.keys() == theirs.keys()
    assert not any("router" in name for name in ours)
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert same == {name for name in ours if ".experts." in name}
    assert torch.equal(stock_logits(tmp_path / "out", tmp_path), our_logits(tmp_path / "out"))


def test_only_such_matrices_are_refused(lara, tmp_path):
    with pytest.raises(PassError, match=r"in_proj\.weight is not a linear layer that calibrated methods reach"):
        compress.apply(
            "prune_unstructured", lara, tmp_path / "out", data=IDS, only=["*.in_proj"], method="sparsegpt", **PRUNE
        )
