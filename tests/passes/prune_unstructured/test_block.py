"""`prune_unstructured` with calibration data: what is promised of every method, and of the tuning after it."""

from __future__ import annotations

import pytest
import torch

from compress.architectures.model_map import model_map
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.write import stored_form, write_checkpoint
from compress.data.batches import Batches
from compress.errors import PassError
from compress.models.loading import load_model
from compress.workspace import Workspace
from tests import pico
from tests.toolbox import GROUPS, apply, output_error, plan, write

METHODS = ["wanda", "sparsegpt", "alps"]
#: Family, settings ▶ the methods of `make test`.
PLANNED = {
    ("llama", "sparsity"): ["alps"],
    ("llama", "pattern"): ["sparsegpt"],
    ("gpt2", "pattern"): ["wanda"],
    ("bert", "sparsity"): ["sparsegpt"],
    ("qwen3_moe", "sparsity"): ["wanda"],
    ("gpt2", "sparsity"): [],
    ("bert", "pattern"): [],
    ("qwen3_moe", "pattern"): [],
}
AMOUNTS = {"sparsity": 0.37, "pattern": "2:4"}


@pytest.mark.parametrize(
    ("family", "key", "method"),
    [
        pytest.param(*case, method, marks=[] if method in quick else [pytest.mark.slow])
        for case, quick in PLANNED.items()
        for method in METHODS
    ],
)
def test_prune_unstructured_writes_what_is_planned(family, key, method, folders, data, tmp_path):
    checkpoint = open_checkpoint(folders[family])
    settings = {key: AMOUNTS[key], "method": method, "reconstruction_epochs": 1 if method == "alps" else 0}
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


@pytest.mark.slow
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
        errors.append(output_error(folders["llama"], out.folder, data.ids))
        if "blocks" in details:
            rows = details["blocks"][0]["tensors"]
            assert len(rows) == 7
            assert all(0 < row["error"] < 1 and row["sparsity"] == pytest.approx(0.5) for row in rows.values())
            layers.append(sum(row["error"] for row in rows.values()))
            assert ("tuning" in details["blocks"][0]) == bool(settings["reconstruction_epochs"])
    assert errors[4] < errors[3] < errors[2] < errors[1] < errors[0], errors
    assert layers[2] < layers[1] < layers[0]
    assert layers[2] == layers[3]  # before any tuning, the first block is the same


def test_part_of_an_epoch_takes_its_part_of_the_steps(data, tmp_path):
    model = open_checkpoint(pico.folder("llama", num_hidden_layers=1))
    for epochs, steps in ((0.5, 2), (1, 4), (1.6, 7)):  # 15 samples, 4 at a time
        details: dict = {}
        settings = {"method": "wanda", "sparsity": 0.5, "reconstruction_lr": 0.04, "reconstruction_epochs": epochs}
        work = tmp_path / str(epochs)
        apply(model, "prune_unstructured", data=data, work=work, details=details, **settings)
        for block in details["blocks"]:
            tries = {0.04: 1, 0.01: 2, 0.0025: 3}[block["tuning"]["rate"]]
            assert block["tuning"]["steps"] == tries * steps


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * (m != "sparsegpt")) for m in METHODS])
def test_calibrated_methods_keep_an_earlier_mask(method, data, tmp_path):
    whole = open_checkpoint(pico.folder("llama", num_hidden_layers=2))
    half = write(apply(whole, "prune_unstructured", method="magnitude", sparsity=0.5), tmp_path / "half")
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
    """The first block's masks, by |w| · ‖x‖ compared within each output, computed here with the stock model behind earlier matrices."""
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
    for group in GROUPS:
        path, seen = f"model.layers.0.{group[0]}", []
        module = model.get_submodule(path)
        handle = module.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        with torch.no_grad():
            model(input_ids=data.ids)
        handle.remove()
        score = module.weight.detach().abs() * seen[0].flatten(0, 1).norm(dim=0)
        expected = score > score.sort(dim=1).values[:, score.shape[1] // 2 - 1, None]
        assert torch.equal(pruned.tensor(f"{path}.weight").mask, expected)
        for name in group:  # the next ones read what these output when they are pruned
            path = f"model.layers.0.{name}"
            model.get_submodule(path).weight.data.copy_(pruned.tensor(f"{path}.weight").data)


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
    settings = {"method": "sparsegpt", "sparsity": 0.5, "reconstruction_epochs": 1}
    pruned = apply(checkpoint, "prune_unstructured", data=data, work=tmp_path / "w", **settings)
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


def test_owl_counts_match_masks(folders, data, tmp_path):
    settings = {"method": "wanda", "sparsity": 0.6, "reconstruction_epochs": 0, "allocation": "owl"}
    checkpoint = open_checkpoint(folders["llama"])
    assert not plan(checkpoint, "prune_unstructured", **settings).exact
    pruned = apply(checkpoint, "prune_unstructured", data=data, work=tmp_path, **settings)
    kept = {t.name: t.kept for t in pruned.spec.stored() if t.kept is not None}
    assert kept == {name: int(pruned.tensor(name).mask.sum()) for name in kept}
    assert len({kept[name] for name in kept if "up_proj" in name}) > 1


def test_owl_allocation_ignores_experts_without_tokens(tmp_path):
    """A block's share of outliers is that of the matrices that something is known of."""
    from compress.blockwise.inputs import Inputs
    from compress.blockwise.runner import BlockRunner
    from compress.passes.prune_unstructured.block import owl_allocation
    from compress.progress import SilentProgress

    checkpoint = open_checkpoint(pico.save_cold(tmp_path / "in"))
    ids = Batches(torch.randint(2, 250, (4, 32), generator=torch.Generator().manual_seed(0)))
    seen, every = (
        {n for n in checkpoint.spec.tensors if "layers.0." in n and "experts." in n and int(n.split(".")[5]) < most}
        for most in (4, 8)
    )

    def share(names, folder):
        runner = BlockRunner(
            checkpoint,
            Inputs(ids.values),
            names,
            workspace=Workspace(tmp_path / folder),
            dtype="float32",
            device="cpu",
            progress=SilentProgress(),
            with_targets=False,
        )
        return owl_allocation(runner, 0.5)[1]["outlier_share"]

    assert share(seen, "seen") == share(every, "every") != [0.0]
