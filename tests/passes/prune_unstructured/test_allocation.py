"""Sparsities allocated by loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress import architectures, passes
from compress.checkpoint.open import open_checkpoint
from compress.errors import PassError
from tests import pico
from tests.toolbox import apply, output_error, plan, write

METHODS = ["wanda", "sparsegpt", "alps"]


@pytest.fixture(scope="module")
def idle_block(tmp_path_factory):
    """A llama whose block 2 adds next to nothing to what it reads."""
    model = pico.model("llama")
    with torch.no_grad():
        for part in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            part.weight.mul_(1e-3)
    folder = tmp_path_factory.mktemp("idle")
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_allocation_by_loss_prunes_idle_blocks_most(method, idle_block, data, tmp_path):
    checkpoint, details = open_checkpoint(idle_block), {}
    settings = {"method": method, "sparsity": 0.6, "reconstruction_epochs": 0, "allocation": "kl"}
    pruned = apply(checkpoint, "prune_unstructured", data=data, work=tmp_path / "w", details=details, **settings)
    masks = {t.name: pruned.tensor(t.name).mask for t in pruned.spec.stored() if t.kept is not None}
    removed = {name: 1 - float(mask.double().mean()) for name, mask in masks.items()}
    for name, share in details["allocation"]["sparsity"].items():
        assert removed[name] == pytest.approx(share, abs=0.5 / 32 if method == "wanda" else 1e-9)
        assert (share == pytest.approx(0.8, abs=0.011)) if ".2." in name else (share < 0.8), name
    total = sum(mask.numel() for mask in masks.values())
    if method != "wanda":  # which removes as many of every row
        assert sum(int(mask.sum()) for mask in masks.values()) == total - round(0.6 * total)
    assert not plan(checkpoint, "prune_unstructured", **settings).exact
    assert not (tmp_path / "w/loss").exists()
    half = write(apply(checkpoint, "prune_unstructured", method="magnitude", sparsity=0.5), tmp_path / "half")
    more = apply(half, "prune_unstructured", data=data, work=tmp_path / "m", **settings)
    for name in masks:
        assert not (more.tensor(name).mask & ~half.tensor(name).mask).any()


@pytest.mark.slow
def test_allocation_by_loss_beats_uniform_and_resumes(idle_block, data, tmp_path, monkeypatch):
    from compress.passes.prune_unstructured import divergence

    checkpoint, results = open_checkpoint(idle_block), []
    for i, allocation in enumerate(("uniform", "kl", "kl")):
        pruned = apply(
            checkpoint, "prune_unstructured", data=data, work=tmp_path / str(min(i, 1)), method="sparsegpt", sparsity=0.5,
            reconstruction_epochs=0, allocation=allocation,
        )  # fmt: skip
        results.append(write(pruned, tmp_path / f"out{i}").folder)
        if i == 1:  # what was measured lies in the work folder
            (tmp_path / "1/state.json").unlink()
            monkeypatch.setattr(divergence, "pruning_divergences", None)
    assert output_error(idle_block, results[1], data.ids) < 0.8 * output_error(idle_block, results[0], data.ids)
    assert (results[1] / "model.safetensors").read_bytes() == (results[2] / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_allocation_by_loss_of_gpt2_and_refusals(folders, data, tmp_path):
    settings = {"method": "sparsegpt", "sparsity": 0.6, "reconstruction_epochs": 0, "allocation": "kl"}
    pruned = apply(open_checkpoint(folders["gpt2"]), "prune_unstructured", data=data, work=tmp_path, **settings)
    kept = [(t.kept, t.count) for t in pruned.spec.stored() if t.kept is not None]
    assert sum(k for k, _ in kept) == sum(n for _, n in kept) - round(0.6 * sum(n for _, n in kept))
    moe = apply(open_checkpoint(folders["mixtral"]), "prune_unstructured", data=data, work=tmp_path / "moe", **settings)
    experts = [t.kept / t.count for t in moe.spec.stored() if ".experts." in t.name]
    assert len(experts) == 48
    assert 0.15 < min(experts) < 0.4 < max(experts)
    import transformers

    transformers.AutoModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path / "base")
    with pytest.raises(PassError, match="`allocation: kl` needs a model that predicts tokens"):
        plan(open_checkpoint(tmp_path / "base"), "prune_unstructured", **settings)
    with pytest.raises(ValueError, match="`allocation` goes with `sparsity`"):
        plan(open_checkpoint(folders["gpt2"]), "prune_unstructured", pattern="2:4", allocation="kl")


def test_allocation_by_loss_takes_the_memory_of_one_block(folders):
    instance = passes.get("prune_unstructured")
    spec = open_checkpoint(folders["llama"]).spec
    rename = architectures.of(spec.structure.config).renumber
    blocks = [t for t in spec.stored() if ".layers.0." in t.name]
    copies = {(name := rename(t.name, i)): replace(t, name=name) for i in range(900) for t in blocks}
    big = replace(spec, tensors={**spec.tensors, **copies})
    settings = instance.settings(sparsity=0.5, allocation="kl")
    assert instance.memory(big, settings, 4) == instance.memory(spec, settings, 4)
