"""Two processes at one sweep, and at a whole run, agree with one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from compress.checkpoint.open import open_checkpoint
from tests import pico
from tests.conftest import ROOT
from tests.processes import Process


def torchrun(*command, processes=2):
    """As a user starts it: three cold interpreters."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
        timeout=240,
    )


COMPRESS = "from compress.cli import main; main()"


def world(code, *arguments, count=2, status=0):
    """The processes that torchrun would start, forked; what the first prints, or else what one that fails does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    members = [
        Process(code, *arguments, environment={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    first, *others = members
    try:
        output, errors = first.communicate(240)
        assert first.returncode == status, errors[-3000:]
        for other in others:
            assert other.wait(60) == 0, other.communicate()[1][-3000:]
    finally:
        for member in members:
            member.kill()
    return output


BLOCKWISE = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from compress.passes.cast.block import CastOptions, cast_block
from compress.passes.prune_unstructured.block import PruneOptions, prune_block
from compress.distributed import ProcessGroup
from compress.blockwise.inputs import Inputs
from compress.blockwise.runner import BlockRunner
from compress.blockwise.reconstruct import Reconstruction
from compress.architectures.model_map import model_map
from compress.spec.formats import QuantFormat
from compress.checkpoint.open import open_checkpoint
from compress.progress import SilentProgress
from compress.workspace import Workspace
dist.init_process_group("gloo")
processes = ProcessGroup(dist.get_rank(), dist.get_world_size())
torch.set_num_threads(1)
for folder in sys.argv[2:]:
    checkpoint = open_checkpoint(folder)
    wanted = {x.name for x in model_map(checkpoint.spec).layers if len(x.tensor.shape) == 2}
    ids = torch.randint(2, 250, (15, 24), generator=torch.Generator().manual_seed(1))
    for method in ("wanda", "sparsegpt", "alps", "pattern"):
        sparsity, pattern = (None, (2, 4)) if method == "pattern" else (dict.fromkeys(wanted, 0.5), None)
        options = PruneOptions("sparsegpt" if pattern else method, sparsity, pattern, Reconstruction(2, 0.02, 4) if method == "alps" and "llama" in folder else None)
        runner = BlockRunner(
            checkpoint, Inputs({"input_ids": ids}), wanted, workspace=Workspace(Path(sys.argv[1]) / f"{Path(folder).name}-{method}-{processes.world}", processes),
            dtype="float32", device="cpu", progress=SilentProgress(), with_targets=options.reconstruction is not None)
        runner.run(lambda block: prune_block(block, options), "pruning")
    options = CastOptions(None, {name: QuantFormat("int4", 8) for name in wanted}, dict.fromkeys(wanted, torch.float32))
    runner = BlockRunner(
        checkpoint, Inputs({"input_ids": ids}), wanted, workspace=Workspace(Path(sys.argv[1]) / f"{Path(folder).name}-cast-{processes.world}", processes),
        dtype="float32", device="cpu", progress=SilentProgress(), with_targets=True)
    runner.run(lambda block: cast_block(block, options), "casting")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_world_of_two_finds_what_one_process_does(tmp_path):
    """Sums in another order differ in their last digits, so a mask may differ where two weights are all but equal."""
    folders = [pico.save(tmp_path / f, f, with_tokenizer=False, num_hidden_layers=2) for f in ("llama", "qwen3_moe")]
    for count in (1, 2):
        world(BLOCKWISE, tmp_path / "work", *folders, count=count)
    for folder in folders:
        one, two = (tmp_path / "work" / f"{folder.name}-cast-{n}" / "blocks" for n in (1, 2))
        # a code that differs changes the inputs of all later matrices: only those that read the first block's inputs see the same
        path = min(one.iterdir())
        a, b = load_file(path), load_file(two / path.name)
        codes = [
            key for key in a if key.endswith(("q_proj.weight:codes", "k_proj.weight:codes", "v_proj.weight:codes"))
        ]
        assert len(codes) == 3
        assert sum(int((a[n] == b[n]).sum()) for n in codes) > 0.97 * sum(a[n].numel() for n in codes)
        for path in sorted(one.iterdir()):
            a, b = load_file(path), load_file(two / path.name)
            assert a.keys() == b.keys()
            for name in (key.removesuffix(":codes") for key in a if key.endswith(":codes")):
                assert float((a[name] - b[name]).norm()) < 0.3 * float(a[name].norm())
        for method, least in (("wanda", 0.999), ("sparsegpt", 0.99), ("alps", 0.93), ("pattern", 0.99)):
            one, two = (tmp_path / "work" / f"{folder.name}-{method}-{n}" / "blocks" for n in (1, 2))
            same, count, difference, scale = 0, 0, 0.0, 0.0
            for path in sorted(one.iterdir()):
                a, b = load_file(path), load_file(two / path.name)
                assert a.keys() == b.keys()
                for name in a:
                    if name.endswith(":keep"):
                        continue
                    same += int(((a[name] == 0) == (b[name] == 0)).sum())
                    count += a[name].numel()
                    difference += float((a[name] - b[name]).square().sum())
                    scale += float(a[name].square().sum())
            assert same >= least * count, (folder.name, method, same / count)
            assert difference <= 3 * (1 - least) * scale, (folder.name, method, difference / scale)


@pytest.fixture
def recipe_file(tmp_path, pico_llama, texts):
    train, valid = texts
    recipe = {
        "model": str(pico_llama),
        "output": str(tmp_path / "out"),
        "device": "cpu",
        "document_separator": "<|doc|>",
        "data": {
            "calibration": {"files": [str(train)], "samples": 8, "length": 32},
            "evaluation": {"files": [str(valid)], "window": 32, "max_documents": 30},
        },
        "passes": [
            {"prune_structured": {"layers": 1, "compensation": "none"}},
            {"prune_unstructured": {"sparsity": "50%", "reconstruction_epochs": 1}},
            {"cast": {"weights": "bf16"}},
        ],
        "gates": {"size": {"max_ratio": 0.9}},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    return tmp_path / "r.yaml"


@pytest.mark.slow
def test_world_of_two_runs_a_recipe(recipe_file, tmp_path):
    done = torchrun("-m", "compress", "run", recipe_file, "--json", "--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["status"] == "passed"
    assert len(report["stages"][1]["passes"][0]["details"]["blocks"]) == 3
    masks = [
        open_checkpoint(tmp_path / "out").spec.tensors[f"model.layers.{i}.mlp.up_proj.weight"].kept for i in range(3)
    ]
    assert masks == [32 * 64 // 2] * 3
    assert "nothing to do" in world(COMPRESS, "run", recipe_file)
    failing = world(COMPRESS, "run", recipe_file, "--set", "gates.size.max_ratio=0.01", "--quiet", status=1)
    assert "gates: failed" in failing


@pytest.mark.parametrize("method", ["mse", pytest.param("gptq", marks=pytest.mark.slow)])
def test_world_of_two_shares_chosen_formats(recipe_file, tmp_path, method):
    recipe = json.loads(recipe_file.read_text())
    recipe["passes"] = [{"cast": {"bits": 6, "group_size": 16, "method": method, "reconstruction_epochs": 0}}]
    recipe_file.write_text(json.dumps(recipe))
    world(COMPRESS, "run", recipe_file, "--quiet")
    assert len({t.quant_format for t in open_checkpoint(tmp_path / "out").spec.stored()}) > 2


@pytest.mark.slow
def test_world_of_two_shares_sparsities_allocated_by_loss(recipe_file, tmp_path):
    """Which removes as many weights in all as one process would."""
    text = json.loads(recipe_file.read_text())
    prune = {"method": "sparsegpt", "sparsity": "50%", "reconstruction_epochs": 0, "allocation": "kl"}
    recipe_file.write_text(json.dumps({**text, "passes": [{"prune_unstructured": prune}], "gates": {}}))
    report = json.loads(world(COMPRESS, "run", recipe_file, "--json", "--quiet"))
    shares = report["stages"][0]["passes"][0]["details"]["allocation"]["sparsity"]
    tensors = {t.name: t for t in open_checkpoint(tmp_path / "out").spec.stored() if t.kept is not None}
    assert tensors.keys() == shares.keys()
    assert len({round(share, 3) for share in shares.values()}) > 4
    assert all(t.kept == t.count - round(shares[name] * t.count) for name, t in tensors.items())
    assert 2 * sum(t.kept for t in tensors.values()) == sum(t.count for t in tensors.values())


@pytest.mark.slow
def test_world_of_two_shares_widths_chosen_by_loss(recipe_file, tmp_path):
    recipe = json.loads(recipe_file.read_text())
    prune = {"prune_structured": {"mlp": "40%", "allocation": "kl", "reconstruction_epochs": 1}}
    thin = {"share": {"embeddings": "factorize", "embedding_rank": 12}}
    recipe_file.write_text(json.dumps({**recipe, "store": "compact", "passes": [prune, thin], "gates": {}}))
    report = json.loads(world(COMPRESS, "run", recipe_file, "--json", "--quiet"))
    told = report["stages"][0]["passes"][0]["details"]["widths"]["blocks"]
    tensors = open_checkpoint(tmp_path / "out").spec.tensors
    widths = [tensors[f"model.layers.{row['block']}.mlp.down_proj.weight"].shape[1] for row in told]
    assert widths == [64 - row["removed"] for row in told]
    assert len(set(widths)) > 1
    assert sum(widths) == 4 * round(0.6 * 64)
    assert tensors["model.embed_tokens.weight"].shape[1] == 12


@pytest.mark.slow
def test_world_of_two_measures_the_windows_that_one_process_does(recipe_file):
    recipe = json.loads(recipe_file.read_text())
    passes = [{"local_attention": {"window": 8, "full": 2, "tune_epochs": 1}}]
    rows = []
    for count in (1, 2):
        output = str(recipe_file.parent / f"out{count}")
        recipe_file.write_text(json.dumps({**recipe, "output": output, "passes": passes, "gates": {}}))
        report = json.loads(world(COMPRESS, "run", recipe_file, "--json", "--quiet", count=count))
        rows.append(report["stages"][0]["passes"][0]["details"]["windows"])
    one, two = rows
    assert [row["window"] for row in one] == [row["window"] for row in two]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-3)


@pytest.mark.slow
def test_world_of_two_divides_the_cache_as_one_process_does(recipe_file):
    recipe = json.loads(recipe_file.read_text())
    passes = [{"latent_attention": {"max_cache": "60%", "tune_epochs": 1}}]
    found = []
    for count in (1, 2):
        output = str(recipe_file.parent / f"out{count}")
        recipe_file.write_text(json.dumps({**recipe, "output": output, "passes": passes, "gates": {}}))
        report = json.loads(world(COMPRESS, "run", recipe_file, "--json", "--quiet", count=count))
        found.append(report["stages"][0]["passes"][0]["details"]["latent"])
    one, two = found
    assert one["counts"] == two["counts"]
    assert [row["divergence"] for row in two["tried"]] == pytest.approx(
        [row["divergence"] for row in one["tried"]], rel=1e-3
    )
    assert two["expected"] == pytest.approx(one["expected"], rel=1e-3)


@pytest.mark.slow  # beside the test of a recipe, three more cold interpreters
def test_world_ends_when_the_first_process_fails(recipe_file):
    done = torchrun("-m", "compress", "run", recipe_file, "--set", "passes.0.prune_structured.layers=[9]")
    assert done.returncode != 0
    assert "there is no block 9" in done.stderr


UNITS = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from compress import passes
from compress.data.batches import Batches
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.write import write_checkpoint
from compress.distributed import ProcessGroup
from compress.passes.base import Context
from compress.progress import SilentProgress
from compress.workspace import Workspace
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
checkpoint = open_checkpoint(sys.argv[2])
ids = torch.randint(2, 250, (31, 24), generator=torch.Generator().manual_seed(1))
work = Path(sys.argv[1])
instance = passes.get("prune_structured")
settings = instance.settings(layers=1, experts=1, hidden=8, heads=2, mlp=0.25, reconstruction_epochs=2)
context = Context(checkpoint, "cpu", "float32", 0, None, lambda name: Batches(ids), SilentProgress(), Workspace(work / f"work{world}", ProcessGroup(rank, world)))
smaller = instance.apply(checkpoint, settings, context)
if rank == 0:
    write_checkpoint(smaller, work / f"out{world}")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_world_of_two_removes_the_same_units(tmp_path):
    """Blocks, experts, hidden channels, heads and neurons; what is kept is the same, its weights up to the order of sums."""
    folder = pico.save(tmp_path / "in", "qwen3_moe", with_tokenizer=False)
    for count in (1, 2):
        world(UNITS, tmp_path, folder, count=count)
    one, two = (load_file(tmp_path / f"out{n}" / "model.safetensors") for n in (1, 2))
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
    for name, value in one.items():
        difference = float((value - two[name]).square().sum() / value.square().sum())
        assert difference < 0.01, (name, difference)


@pytest.mark.slow
def test_world_of_two_fills_the_same_gap(tmp_path):
    """The last matrix in front of a removed block, and its bias, up to the order of sums; Conv1D shapes it [I, O]."""
    folder = pico.save(tmp_path / "in", "gpt2", with_tokenizer=False)
    settings = UNITS.index("layers="), UNITS.index(")\ncontext")
    script = f"{UNITS[: settings[0]]}layers=[1], effort='fast'{UNITS[settings[1] :]}"
    for count in (1, 2):
        world(script, tmp_path, folder, count=count)
    one, two = (load_file(tmp_path / f"out{n}" / "model.safetensors") for n in (1, 2))
    before = load_file(folder / "model.safetensors")
    changed = {name for name in one if ".h.0." in name and not torch.equal(one[name], before[name])}
    assert {name.split(".h.0.")[1] for name in changed} == {"mlp.c_proj.weight", "mlp.c_proj.bias"}
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_world_of_two_trains_the_same_student(recipe_file, tmp_path):
    """Prune, distill, cast as one run; sums in another order differ in their last digits, so weights nearly agree."""
    recipe = json.loads(recipe_file.read_text())
    recipe["data"]["training"] = {**recipe["data"]["calibration"], "samples": None, "length": 32}
    del recipe["data"]["training"]["samples"]
    recipe["passes"] = [
        {"prune_structured": {"layers": [2], "compensation": "none"}},
        {"prune_unstructured": {"method": "magnitude", "sparsity": "50%"}},
        {
            "distill": {
                "steps": 6,
                "batch_size": 6,
                "micro_batch_size": 2,
                "validation_samples": 6,
                "evaluate_every": 3,
                "ema_decay": 0.5,
            }
        },
        {"cast": {"weights": "bf16"}},
    ]
    recipe["gates"] = {"size": {"max_ratio": 0.9}, "kl": {"max": 5.0}}
    recipe["data"]["evaluation"]["max_documents"] = 4
    outputs = []
    for count in (1, 2):
        recipe["output"] = str(tmp_path / f"out{count}")
        recipe_file.write_text(json.dumps(recipe))
        report = json.loads(world(COMPRESS, "run", recipe_file, "--json", "--quiet", count=count))
        assert report["status"] == "passed"
        training = report["stages"][2]["passes"][0]["details"]["training"]
        outputs.append((load_file(tmp_path / f"out{count}" / "model.safetensors"), training))
    (one, first), (two, second) = outputs
    for a, b in zip(first["held_out"] + first["losses"], second["held_out"] + second["losses"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert (value == 0).equal(two[name] == 0), name
        difference = float((value.float() - two[name].float()).norm() / value.float().norm())
        assert difference < 0.01, (name, difference)
