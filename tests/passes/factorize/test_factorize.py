"""Low-rank factors: what is left in files and in memory, ranks within the budget, and what later passes do with them."""

from __future__ import annotations

import pytest
import torch

import compress
from compress.api import unpack
from compress.checkpoint.open import open_checkpoint
from compress.errors import CompressError, PassError
from compress.models.loading import load_model
from tests import pico
from tests.toolbox import divergence

IDS = torch.randint(0, 250, (16, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("factorize")
    return {f: pico.save(root / f, f) for f in ("llama", "gpt2", "opt", "phi3", "bert", "qwen3_moe", "t5")}


def factorize(folder, out, **settings):
    return compress.apply("factorize", folder, out, store="compact", data=IDS, **settings)


@pytest.mark.parametrize("family", pico.families(["llama", "gpt2", "opt", "phi3", "bert"], tier=("gpt2",)))
def test_factorize_loads_and_matches_dense_twin(family, folders, tmp_path):
    allocation = "uniform" if family == "bert" else "kl"
    details = {}
    factorize(
        folders[family],
        tmp_path / "out",
        keep_parameters=0.6,
        allocation=allocation,
        reconstruction_epochs=1,
        details=details,
    )
    before, after = (open_checkpoint(f).spec for f in (folders[family], tmp_path / "out"))
    model = load_model(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == after.parameters < before.parameters
    chosen = [e.module for e in after.structure.edits]
    assert len(chosen) == len({*chosen}) >= 4
    unpack(tmp_path / "out", tmp_path / "dense")
    twin = load_model(tmp_path / "dense")
    assert torch.allclose(pico.logits(model), pico.logits(twin), rtol=1e-4, atol=1e-4)
    blocks = details["blocks"]
    rows = [row for block in blocks for row in block.get("tensors", {}).values()]
    assert len(rows) == len(chosen)
    for edit in after.structure.edits:
        down, up = (after.tensors[f"{edit.module}.{part}.weight"].shape for part in ("down", "up"))
        assert down[0] == up[1] == edit.values["rank"]


@pytest.mark.slow
def test_factorize_ranks_keep_the_budget_and_lower_the_error(folders, tmp_path):
    found = {}
    for name, settings in {
        "uniform": {"allocation": "uniform", "reconstruction_epochs": 0},
        "loss": {"reconstruction_epochs": 0},
        "tuned": {},
    }.items():
        factorize(folders["llama"], tmp_path / name, keep_parameters=0.5, **settings)
        found[name] = divergence(folders["llama"], tmp_path / name, IDS)
    sizes = {name: open_checkpoint(tmp_path / name).spec.parameters for name in found}
    assert sizes["loss"] <= sizes["uniform"]
    assert sizes["loss"] > 0.97 * sizes["uniform"]
    assert found["tuned"] <= found["loss"] < found["uniform"]  # tuning is undone where held-back samples do not gain


@pytest.mark.slow
def test_factorize_is_reproducible(folders, tmp_path):
    for name in ("a", "b"):
        factorize(folders["llama"], tmp_path / name, keep_parameters=0.6, reconstruction_epochs=1)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.slow
def test_factorize_is_followed_by_other_passes(folders, tmp_path):
    factorize(folders["gpt2"], tmp_path / "factors", rank=8, reconstruction_epochs=0)
    common = {"data": IDS, "store": "compact", "effort": "fast"}
    compress.apply("prune_unstructured", tmp_path / "factors", tmp_path / "sparse", sparsity=0.5, **common)
    compress.apply("cast", tmp_path / "sparse", tmp_path / "codes", weights="int4", group_size=32, **common)
    spec = open_checkpoint(tmp_path / "codes").spec
    factors = [t for t in spec.stored() if t.name.endswith((".down.weight", ".up.weight"))]
    assert len(factors) == 2 * 4 * 4
    assert all(t.quant_format is not None and t.kept is not None and not t.quant_format.transposed for t in factors)
    assert {t.quant_format.group for t in factors} == {0, 32}
    unpack(tmp_path / "codes", tmp_path / "dense")
    x, y = (pico.logits(load_model(tmp_path / f)) for f in ("codes", "dense"))
    assert torch.allclose(x, y, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"keep_parameters": 0.01}, "less than one rank"),
        ("llama", {"rank": 500}, "as large as the matrices"),
        ("llama", {"rank": 4, "keep_parameters": 0.5}, "either"),
        ("llama", {"rank": 4, "only": ["lm_head"]}, "no weight matrix|outside the blocks"),
        ("bert", {"keep_parameters": 0.5, "only": ["*pooler*"]}, "matches no module"),
        ("qwen3_moe", {"rank": 4, "only": ["*experts.0.gate_proj"]}, "fused with other experts"),
        ("t5", {"rank": 4}, "cannot be changed block by block"),
    ],
)
def test_factorize_refuses_unfit_models(family, settings, message, folders, tmp_path):
    with pytest.raises(CompressError, match=message) as problem:
        factorize(folders[family], tmp_path / "out", **settings)
    assert "\n" not in str(problem.value)


def test_factorize_refuses_masks_and_stock_store(folders, tmp_path):
    compress.apply("prune_unstructured", folders["llama"], tmp_path / "masks", method="magnitude", sparsity=0.5)
    with pytest.raises(PassError, match="factors would fill them in"):
        factorize(tmp_path / "masks", tmp_path / "out", rank=4)
    with pytest.raises(PassError, match="use `store: compact`"):
        compress.apply("factorize", folders["llama"], tmp_path / "out", rank=4, data=IDS)
