"""`prune_unstructured` with calibration data: what is promised of every method, and of the tuning after it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress import architectures, passes
from compress.architectures.model_map import model_map
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.write import stored_form, write_checkpoint
from compress.data.batches import Batches
from compress.errors import PassError
from compress.models.loading import load_model
from tests import pico
from tests.passes.helpers import apply, plan, write

METHODS = ["wanda", "sparsegpt", "alps"]


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    return Batches(torch.randint(2, 250, (16, 24), generator=generator))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {f: pico.save(root / f, f, with_tokenizer=False) for f in ("llama", "gpt2", "bert", "qwen3_moe")}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{"sparsity": 0.37}, {"pattern": "2:4"}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "qwen3_moe"])
def test_prune_unstructured_writes_what_is_planned(family, settings, method, folders, data, tmp_path):
    checkpoint = open_checkpoint(folders[family])
    settings = {**settings, "method": method, "reconstruction_epochs": 1 if method == "alps" else 0}
    planned = plan(checkpoint, "prune_unstructured", **settings)
    assert planned.exact
    _, layout = stored_form(planned, "compact", 10**9, checkpoint.metadata)
    pruned = apply(checkpoint, "prune_unstructured", data=data, work=tmp_path / "work", **settings)
    written = write_checkpoint(pruned, tmp_path / "out", store="compact")
    assert written.bytes == layout.bytes
    linears = model_map(checkpoint.spec).linears
    for tensor in open_checkpoint(written.folder).spec.stored():
        value = pruned.tensor(tensor.name)
        if tensor.kept is not None:
            assert not value.data[~value.mask].any()
            assert int(value.mask.sum()) == tensor.kept
            if "pattern" in settings:
                along = value.mask.movedim(linears[tensor.name].input_axis, -1).reshape(-1, 4)
                assert (along.sum(1) == 2).all()
        elif not settings["reconstruction_epochs"]:
            assert torch.equal(value.data, checkpoint.tensor(tensor.name).data), tensor.name


def error(folder, other, data):
    """Mean squared difference of the outputs of two models."""
    models = [load_model(f, dtype="float32") for f in (folder, other)]
    with torch.no_grad():
        first, second = (m(input_ids=data.ids)[0] for m in models)
    return float((first - second).square().mean())


def test_methods_and_tuning_lower_the_error_in_turn(folders, data, tmp_path):
    checkpoint = open_checkpoint(folders["llama"])
    errors, layers = [], []
    for i, settings in enumerate(
        [
            {"method": "magnitude"},
            {"method": "wanda", "reconstruction_epochs": 0},
            {"method": "sparsegpt", "reconstruction_epochs": 0},
            {"method": "alps", "reconstruction_epochs": 0},
            {"method": "alps", "reconstruction_epochs": 20},
        ]
    ):
        details: dict = {}
        pruned = apply(
            checkpoint,
            "prune_unstructured",
            data=data,
            work=tmp_path / f"w{i}",
            details=details,
            sparsity=0.5,
            **settings,
        )
        out = write(pruned, tmp_path / str(i))
        errors.append(error(folders["llama"], out.folder, data))
        if "blocks" in details:
            rows = details["blocks"][0]["tensors"]
            assert len(rows) == 7
            assert all(0 < row["error"] < 1 and row["sparsity"] == pytest.approx(0.5) for row in rows.values())
            layers.append(sum(row["error"] for row in rows.values()))
            assert ("tuning" in details["blocks"][0]) == bool(settings["reconstruction_epochs"])
    assert errors[4] < errors[3] < errors[2] < errors[1] < errors[0], errors
    assert layers[2] < layers[1] < layers[0]
    assert layers[2] == layers[3]  # before any tuning, the first block is the same


@pytest.mark.parametrize("method", METHODS)
def test_calibrated_methods_keep_an_earlier_mask(method, folders, data, tmp_path):
    half = write(
        apply(open_checkpoint(folders["llama"]), "prune_unstructured", method="magnitude", sparsity=0.5),
        tmp_path / "half",
    )
    for i, settings in enumerate(({"sparsity": 0.7}, {"pattern": "2:4"}, {"sparsity": 0.3, "allow_noop": True})):
        more = apply(
            half,
            "prune_unstructured",
            data=data,
            work=tmp_path / str(i),
            method=method,
            reconstruction_epochs=1,
            **settings,
        )
        for tensor in more.spec.stored():
            if tensor.kept is not None:
                old, new = half.tensor(tensor.name).mask, more.tensor(tensor.name).mask
                assert not (new & ~old).any()
                assert int(new.sum()) == tensor.kept


def test_wanda_masks_match_formula(folders, data, tmp_path):
    """The first block's masks, from |w| · ‖x‖ compared within each output, computed here with the stock model."""
    pruned = apply(
        open_checkpoint(folders["llama"]),
        "prune_unstructured",
        data=data,
        work=tmp_path,
        method="wanda",
        sparsity=0.5,
        reconstruction_epochs=0,
    )
    model = load_model(folders["llama"], dtype="float32")
    for name in ("q_proj", "o_proj", "down_proj"):
        path = next(n for n, _ in model.named_modules() if n.startswith("model.layers.0.") and n.endswith(name))
        module, seen = model.get_submodule(path), []
        handle = module.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        with torch.no_grad():
            model(input_ids=data.ids)
        handle.remove()
        score = module.weight.detach().abs() * seen[0].flatten(0, 1).norm(dim=0)
        expected = score > score.sort(dim=1).values[:, score.shape[1] // 2 - 1, None]
        assert torch.equal(pruned.tensor(f"{path}.weight").mask, expected)


def test_tuning_is_undone_when_it_raises_the_error(folders, data, tmp_path):
    """A step far too large makes the held-out error worse: the weights stay what the solver gave."""
    results = []
    for i, reconstruction in enumerate(
        ({"reconstruction_epochs": 0}, {"reconstruction_epochs": 1, "reconstruction_lr": 0.99})
    ):
        details: dict = {}
        pruned = apply(
            open_checkpoint(folders["llama"]), "prune_unstructured", data=data, work=tmp_path / str(i), details=details, method="wanda",
            sparsity=0.1, **reconstruction,
        )  # fmt: skip
        results.append({t.name: pruned.tensor(t.name) for t in pruned.spec.stored()})
    report = [row["tuning"] for row in details["blocks"]]
    assert any(not row["kept"] for row in report), report
    assert all(row["kept"] == (row["after"] < row["before"]) for row in report)
    if all(not row["kept"] for row in report):
        assert all(torch.equal(results[0][n].data, results[1][n].data) for n in results[0])


def test_tuning_moves_norms_and_keeps_bf16(data, tmp_path):
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", dtype=torch.bfloat16, with_tokenizer=False))
    pruned = apply(checkpoint, "prune_unstructured", data=data, work=tmp_path / "w", method="sparsegpt", sparsity=0.5)
    name = "model.layers.0.input_layernorm.weight"
    assert pruned.tensor(name).data.dtype == torch.bfloat16
    assert not torch.equal(pruned.tensor(name).data, checkpoint.tensor(name).data)
    for outside in ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(pruned.tensor(outside).data, checkpoint.tensor(outside).data)


def test_calibrated_methods_refuse_unfit_settings(folders, tmp_path):
    checkpoint = open_checkpoint(folders["llama"])
    with pytest.raises(PassError, match=r"lm_head.weight is outside the blocks.*use `method: magnitude`"):
        plan(checkpoint, "prune_unstructured", sparsity=0.5, only=["lm_head"])
    with pytest.raises(ValueError, match=r"goes with `method: magnitude`"):
        plan(checkpoint, "prune_unstructured", sparsity=0.5, scope="global")


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


def test_owl_counts_match_masks(folders, data, tmp_path):
    settings = {"method": "wanda", "sparsity": 0.6, "reconstruction_epochs": 0, "allocation": "owl"}
    checkpoint = open_checkpoint(folders["llama"])
    assert not plan(checkpoint, "prune_unstructured", **settings).exact
    pruned = apply(checkpoint, "prune_unstructured", data=data, work=tmp_path, **settings)
    kept = {t.name: t.kept for t in pruned.spec.stored() if t.kept is not None}
    assert kept == {name: int(pruned.tensor(name).mask.sum()) for name in kept}
    assert len({kept[name] for name in kept if "up_proj" in name}) > 1


def test_allocation_by_loss_beats_uniform_and_resumes(idle_block, data, tmp_path, monkeypatch):
    from compress.sensitivity import matrices

    checkpoint, results = open_checkpoint(idle_block), []
    for i, allocation in enumerate(("uniform", "kl", "kl")):
        pruned = apply(
            checkpoint, "prune_unstructured", data=data, work=tmp_path / str(min(i, 1)), method="sparsegpt", sparsity=0.5,
            reconstruction_epochs=0, allocation=allocation,
        )  # fmt: skip
        results.append(write(pruned, tmp_path / f"out{i}").folder)
        if i == 1:  # what was measured lies in the work folder
            (tmp_path / "1/state.json").unlink()
            monkeypatch.setattr(matrices, "divergences", None)
    assert error(idle_block, results[1], data) < 0.8 * error(idle_block, results[0], data)
    assert (results[1] / "model.safetensors").read_bytes() == (results[2] / "model.safetensors").read_bytes()


def test_allocation_by_loss_of_gpt2_and_refusals(folders, data, tmp_path):
    settings = {"method": "sparsegpt", "sparsity": 0.6, "reconstruction_epochs": 0, "allocation": "kl"}
    pruned = apply(open_checkpoint(folders["gpt2"]), "prune_unstructured", data=data, work=tmp_path, **settings)
    kept = [(t.kept, t.count) for t in pruned.spec.stored() if t.kept is not None]
    assert sum(k for k, _ in kept) == sum(n for _, n in kept) - round(0.6 * sum(n for _, n in kept))
    with pytest.raises(PassError, match=r"`allocation: kl` does not reach .*experts.*; use `allocation: uniform` or"):
        plan(open_checkpoint(folders["qwen3_moe"]), "prune_unstructured", **settings)
    import transformers

    transformers.AutoModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path / "base")
    with pytest.raises(PassError, match="`allocation: kl` needs a model that predicts tokens"):
        plan(open_checkpoint(tmp_path / "base"), "prune_unstructured", **settings)
    with pytest.raises(ValueError, match="`allocation` goes with `sparsity`"):
        plan(open_checkpoint(folders["gpt2"]), "prune_unstructured", pattern="2:4", allocation="kl")


def test_allocation_by_loss_memory_is_that_of_the_model(folders):
    instance = passes.get("prune_unstructured")
    spec = open_checkpoint(folders["llama"]).spec
    rename = architectures.of(spec.structure.config).renumber
    blocks = [t for t in spec.stored() if ".layers.0." in t.name]
    copies = {(name := rename(t.name, i)): replace(t, name=name) for i in range(9000) for t in blocks}
    big = replace(spec, tensors={**spec.tensors, **copies})
    most = [
        instance.memory(big, instance.settings(sparsity=0.5, reconstruction_epochs=0, method="wanda", allocation=a), 4)
        for a in ("owl", "kl")
    ]
    pruned = sum(t.count for t in big.stored() if ".layers." in t.name and len(t.shape) == 2)
    assert most[1] == 4 * big.parameters + 10 * pruned > most[0]
