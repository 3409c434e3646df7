from __future__ import annotations

import pytest
import torch

import compress
from compress.checkpoint.open import open_checkpoint
from compress.errors import CompressError, PassError
from compress.models.loading import load_model
from tests import pico
from tests.toolbox import apply, plan, write


def test_prune_unstructured_takes_only_matrices_of_blocks(pico_llama):
    spec = plan(open_checkpoint(pico_llama), "prune_unstructured", method="magnitude", sparsity=0.5)
    masked = {t.module for t in spec.stored() if t.kept is not None}
    parts = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {m.rpartition(".")[2] for m in masked} == parts
    assert len(masked) == 4 * len(parts)


def test_magnitude_matches_zeroing_the_smallest(pico_llama, tmp_path):
    """The pruned checkpoint computes what the original computes with those weights set to zero by plain torch."""
    out = write(
        apply(open_checkpoint(pico_llama), "prune_unstructured", method="magnitude", sparsity=0.3),
        tmp_path / "out",
        store="compact",
    )
    model = load_model(pico_llama)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name and weight.ndim == 2:
                count = round(0.3 * weight.numel())
                weight.view(-1)[weight.abs().view(-1).argsort()[:count]] = 0
    assert torch.equal(pico.logits(model), pico.logits(load_model(out.folder)))


def test_magnitude_uses_one_global_threshold(pico_llama):
    checkpoint = open_checkpoint(pico_llama)
    pruned = apply(checkpoint, "prune_unstructured", method="magnitude", sparsity=0.5, scope="global")
    assert pruned.spec.exact
    names = [t.name for t in pruned.spec.stored() if t.kept is not None]
    values = torch.cat([checkpoint.tensor(n).data.flatten().abs() for n in names])
    threshold = values.sort().values[round(0.5 * len(values))]
    for name in names:
        assert torch.equal(pruned.tensor(name).mask, checkpoint.tensor(name).data.abs() >= threshold)
    assert not plan(checkpoint, "prune_unstructured", method="magnitude", sparsity=0.5, scope="global").exact


def test_magnitude_keeps_an_earlier_mask(pico_llama):
    half = apply(open_checkpoint(pico_llama), "prune_unstructured", method="magnitude", sparsity=0.5)
    for settings in ({"sparsity": 0.7}, {"pattern": "2:4"}, {"sparsity": 0.7, "scope": "global"}):
        more = apply(half, "prune_unstructured", method="magnitude", **settings)
        for tensor in more.spec.stored():
            if tensor.kept is not None:
                old, new = half.tensor(tensor.name).mask, more.tensor(tensor.name).mask
                assert not (new & ~old).any()
                assert int(new.sum()) == tensor.kept
    with pytest.raises(PassError, match=r"that sparse already"):
        plan(half, "prune_unstructured", method="magnitude", sparsity=0.4)


def test_magnitude_n_of_m_runs_along_inputs(tmp_path):
    for family in ("llama", "gpt2"):
        checkpoint = open_checkpoint(pico.save(tmp_path / family, family))
        pruned = apply(checkpoint, "prune_unstructured", method="magnitude", pattern="2:4")
        model = load_model(write(pruned, tmp_path / f"{family}-out").folder)
        for name, module in model.named_modules():
            kind = type(module).__name__
            if ("layers" in name or ".h." in name) and kind in ("Linear", "Conv1D"):
                by_output = module.weight if kind == "Linear" else module.weight.T
                assert ((by_output.reshape(len(by_output), -1, 4) != 0).sum(-1) == 2).all()


def test_prune_unstructured_takes_head_and_embeddings_by_name(tmp_path):
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", tie_word_embeddings=True))
    pruned = apply(checkpoint, "prune_unstructured", method="magnitude", sparsity=0.5, only=["lm_head"])
    masked = [t.name for t in pruned.spec.stored() if t.kept is not None]
    assert masked == ["model.embed_tokens.weight"]
    model = load_model(write(pruned, tmp_path / "out").folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert (model.lm_head.weight == 0).float().mean() == pytest.approx(0.5, abs=1e-3)


def test_prune_unstructured_refuses_bad_settings(pico_llama, tmp_path):
    checkpoint = open_checkpoint(pico_llama)
    with pytest.raises(
        PassError,
        match=r"has (32|64) inputs, which 24 does not divide, nor those of \d+ others .*skip them: skip: \[.*\.\*\.",
    ):
        plan(checkpoint, "prune_unstructured", method="magnitude", pattern="12:24")
    with pytest.raises(PassError, match=r"no weight matrix is left"):
        plan(checkpoint, "prune_unstructured", method="magnitude", sparsity=0.5, only=["model.norm"])
    import json

    folder = pico.save(tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    found = plan(open_checkpoint(folder), "prune_unstructured", method="magnitude", sparsity=0.5)
    known = plan(open_checkpoint(pico_llama), "prune_unstructured", method="magnitude", sparsity=0.5)
    assert {t.name for t in found.stored() if t.kept} == {t.name for t in known.stored() if t.kept}
    recipe = {
        "model": str(folder),
        "output": str(tmp_path / "out"),
        "data": {"calibration": {"files": [str(folder / "config.json")], "samples": 2, "length": 8}},
        "passes": [{"prune_unstructured": {"method": "sparsegpt", "sparsity": 0.5}}],
    }
    with pytest.raises(CompressError, match=r"no class of transformers builds a model of the type `unheard_of`"):
        compress.plan(recipe)
    named = plan(open_checkpoint(folder), "prune_unstructured", method="magnitude", sparsity=0.5, only=["*.mlp.*"])
    assert sum(t.kept is not None for t in named.stored()) == 12


def test_n_of_m_runs_along_the_inputs_of_each_matrix_of_gpt2():
    """A table of embeddings lies as in every family; the matrices of blocks are transposed, so N:M runs down their columns."""
    checkpoint = open_checkpoint(pico.folder("gpt2"))
    modules = ["transformer.wte", "transformer.h.0.mlp.c_fc"]
    pruned = apply(checkpoint, "prune_unstructured", method="magnitude", pattern="2:4", only=modules)
    for module, across in zip(modules, (False, True), strict=True):
        value = pruned.tensor(f"{module}.weight")
        mask = value.mask.T if across else value.mask
        assert (mask.reshape(len(mask), -1, 4).sum(2) == 2).all(), module
        dense = checkpoint.tensor(f"{module}.weight").data.abs()
        groups = (dense.T if across else dense).reshape(len(mask), -1, 4)
        kept = groups.masked_fill(~mask.reshape(groups.shape), 0).sum()
        assert torch.isclose(kept, groups.topk(2, dim=2).values.sum()), module
