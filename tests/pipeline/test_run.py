"""Whole runs: what they write, reuse, refuse and publish."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import compress
from compress.checkpoint.open import open_checkpoint
from compress.errors import CompressError, DataError, OutputError, RecipeError, ResourceError
from compress.models.loading import load_model
from tests import pico


def weights(folder: Path) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes()
        for p in sorted(folder.iterdir())
        if p.suffix in (".safetensors", ".json") and p.name != "compress.json"
    }


def test_run_end_to_end(recipe, tmp_path, pico_llama, stock):
    result = compress.run(recipe())
    report = result.report
    assert (result.verdict, result.exit_status, result.published) == ("passed", 0, True)
    out = tmp_path / "out"
    assert result.checkpoint == out
    assert [p["name"] for s in report["stages"] for p in s["passes"]] == [
        "prune_structured",
        "prune_unstructured",
        "cast",
    ]
    for stage in report["stages"]:
        for step in stage["passes"]:
            assert step["exact"]
            assert step["planned"] == step["actual"]
        assert stage["evaluation"] is not None
    on_disk = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert report["result"]["size"]["bytes"] == on_disk
    assert report["original"]["size"]["bytes"] == (pico_llama / "model.safetensors").stat().st_size
    assert on_disk < 0.6 * report["original"]["size"]["bytes"]
    torch.save(pico.logits(compress.load(out, dtype="float32")), tmp_path / "expected.pt")
    stock(
        "import torch, transformers\n"
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True, dtype=torch.float32)\n"
        "x = m(input_ids=(torch.arange(12) * 7 % 250)[None])[0]\n"
        f"assert torch.allclose(x, torch.load({str(tmp_path / 'expected.pt')!r}), atol=1e-6)\n"
    )
    card = (out / "README.md").read_text()
    assert "prune_unstructured" in card
    assert str(tmp_path) not in card
    provenance = json.loads((out / "compress.json").read_text())
    assert [p["name"] for p in provenance["passes"]] == ["prune_structured", "prune_unstructured", "cast"]
    run_folder = tmp_path / "out.run"
    assert {"report.json", "report.md", "junit.xml"} <= {p.name for p in run_folder.iterdir()}
    assert not list(tmp_path.glob(".*"))


def test_run_has_nothing_to_do_the_second_time(recipe, tmp_path):
    first = compress.run(recipe())
    stamp = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    again = compress.run(recipe())
    assert again.nothing_to_do
    assert again.report == first.report
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_run_of_the_same_recipe_gives_the_same_bytes(recipe, tmp_path):
    compress.run(recipe())
    compress.run(recipe(output=str(tmp_path / "other")))
    assert weights(tmp_path / "out") == weights(tmp_path / "other")
    compress.run(recipe(output=str(tmp_path / "other")), fresh=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "other")


@pytest.mark.slow
def test_run_of_fused_stages_matches_separate_ones(recipe, tmp_path):
    compress.run(recipe())
    fused = compress.run(recipe(output=str(tmp_path / "fused"), evaluate_at="end"))
    assert weights(tmp_path / "out") == weights(tmp_path / "fused")
    (stage,) = fused.report["stages"]
    assert len(stage["passes"]) == 3
    sizes = [p["actual"]["bytes"] for p in stage["passes"]]
    assert sizes == sorted(sizes, reverse=True)
    assert all(p["planned"] == p["actual"] for p in stage["passes"])


@pytest.mark.slow
def test_run_recomputes_from_the_first_difference(recipe, tmp_path):
    compress.run(recipe())
    passes = [
        {"prune_structured": {"layers": 1, "compensation": "none"}},
        {"prune_unstructured": {"method": "magnitude", "sparsity": "70%"}},
        {"cast": {"weights": "bf16"}},
    ]
    changed = compress.run(recipe(passes=passes))
    assert [s["reused"] for s in changed.report["stages"]] == [True, False, False]
    assert changed.published
    kept = [t.kept for t in open_checkpoint(tmp_path / "out").spec.stored() if t.kept]
    assert max(kept) == 64 * 32 - round(0.7 * 64 * 32)
    back = compress.run(recipe())
    assert [s["reused"] for s in back.report["stages"]] == [True, True, True]


@pytest.mark.slow
def test_run_recomputes_nothing_when_only_gates_change(recipe):
    compress.run(recipe())
    again = compress.run(recipe(gates={"size": {"max_ratio": 0.01}}))
    assert all(s["reused"] for s in again.report["stages"])
    assert (again.verdict, again.exit_status, again.published) == ("failed", 1, False)


def test_run_publishes_nothing_when_a_gate_fails(recipe, tmp_path):
    result = compress.run(recipe(evaluate=[], gates={"size": {"max_ratio": 0.1}}))
    assert (result.verdict, result.exit_status) == ("failed", 1)
    assert not (tmp_path / "out").exists()
    load_model(result.checkpoint)
    anyway = compress.run(recipe(evaluate=[], gates={"size": {"max_ratio": 0.1}}), publish_anyway=True)
    assert (anyway.verdict, anyway.exit_status, anyway.published) == ("failed", 1, True)
    load_model(tmp_path / "out")


@pytest.mark.slow
def test_run_keeps_an_earlier_result_when_the_new_one_fails(recipe, tmp_path):
    compress.run(recipe(evaluate=[]))
    before = weights(tmp_path / "out")
    failed = compress.run(
        recipe(evaluate=[], passes=[{"cast": {"weights": "fp16"}}], gates={"size": {"max_ratio": 0.1}})
    )
    assert not failed.published
    assert weights(tmp_path / "out") == before


@pytest.mark.slow
def test_run_does_not_reuse_a_changed_stage(recipe, tmp_path):
    compress.run(recipe())
    stage = next(p for p in (tmp_path / "out.run/stages").iterdir() if p.name.endswith("prune_structured"))
    file = stage / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    again = compress.run(recipe(gates={"size": {"max_ratio": 0.61}}))
    assert not again.report["stages"][0]["reused"]


@pytest.mark.slow
def test_run_notices_a_changed_input(recipe, tmp_path, pico_llama):
    model = Path(shutil.copytree(pico_llama, tmp_path / "model"))
    compress.run(recipe(model=str(model)))
    shutil.copy(pico.save(tmp_path / "b", seed=5) / "model.safetensors", model / "model.safetensors")
    again = compress.run(recipe(model=str(model)))
    assert not any(s["reused"] for s in again.report["stages"])


def test_run_refuses_bad_outputs(recipe, tmp_path, pico_llama):
    model = Path(shutil.copytree(pico_llama, tmp_path / "model"))
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"output and model are the same folder"):
        compress.run(recipe(model=str(model), output=str(model)))
    with pytest.raises(OutputError, match=r"the output lies inside the model's folder"):
        compress.run(recipe(model=str(model), output=str(model / "small")))
    with pytest.raises(OutputError, match=r"the model lies inside the output's folder"):
        compress.run(recipe(model=str(model), output=str(tmp_path)))
    out.mkdir()
    compress.run(recipe(passes=[{"cast": {"weights": "bf16"}}], gates={}))  # an empty folder is fine
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes.txt was changed or added since it was published"):
        compress.run(recipe())
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.doc").write_text("mine")
    with pytest.raises(OutputError, match=r"exists and is not a result of this tool"):
        compress.run(recipe())
    assert (out / "thesis.doc").read_text() == "mine"
    shutil.rmtree(out)
    out.write_text("a file")
    with pytest.raises(OutputError, match=r"exists and is not a folder"):
        compress.run(recipe())


def test_run_refuses_shared_text(recipe, texts):
    train, _ = texts
    data = {"calibration": {"files": [str(train)], "samples": 4, "length": 32}, "evaluation": {"files": [str(train)]}}
    with pytest.raises(DataError):
        compress.run(recipe(data=data))


def test_run_refuses_too_little_text(recipe, tmp_path, texts):
    (tmp_path / "short.txt").write_text("too short")
    data = {
        "calibration": {"files": [str(tmp_path / "short.txt")], "samples": 4, "length": 32},
        "evaluation": {"files": [str(texts[1])], "window": 32},
    }
    with pytest.raises(DataError, match=r"asks for 4 samples of 32 tokens, the text gives 0"):
        compress.run(recipe(data=data))


def test_run_checks_memory_and_disk_first(recipe, tmp_path, monkeypatch):
    with pytest.raises(ResourceError, match=r"the run needs about .* GB of memory, max_ram allows 0.01 GB") as caught:
        compress.run(recipe(max_ram="10MB"))
    assert caught.value.exit_status == 4
    import collections

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
    with pytest.raises(ResourceError, match=r"the run needs .* GB of disk, 0.00 GB are free"):
        compress.run(recipe())
    assert not (tmp_path / "out").exists()


def test_run_locates_errors_of_a_pass(recipe):
    settings = [{"cast": {"weights": "bf16"}}, {"prune_structured": {"layers": [9], "compensation": "none"}}]
    with pytest.raises(RecipeError, match=r"passes\.1\.prune_structured\.layers: there is no block 9"):
        compress.run(recipe(passes=settings))


def test_plan_gives_what_a_run_writes(recipe, pico_llama):
    planned = compress.plan(recipe(evaluate=[]))
    result = compress.run(recipe(evaluate=[]))
    assert [s.size.bytes for s in planned.stages] == [s["size"]["bytes"] for s in result.report["stages"]]
    last = planned.stages[-1].passes[-1]
    stock_run = compress.run(recipe(evaluate=[], store="stock", output=recipe()["output"] + "-stock", gates={}))
    assert last.other_store.bytes == stock_run.report["result"]["size"]["bytes"]


@pytest.mark.slow
def test_apply_unpack_and_load(tmp_path, pico_llama, texts):
    train, _ = texts
    out = compress.apply(
        "prune_structured",
        pico_llama,
        tmp_path / "a",
        layers=1,
        data=train,
        samples=4,
        length=32,
        document_separator="<|doc|>",
    )
    assert load_model(out).config.num_hidden_layers == 3
    ids = torch.randint(0, 250, (4, 16))
    compress.apply("prune_structured", pico_llama, tmp_path / "b", layers=2, compensation="none", data=ids)
    small = compress.apply(
        "prune_unstructured", pico_llama, tmp_path / "c", method="magnitude", sparsity=0.6, store="compact"
    )
    dense = compress.unpack(small, tmp_path / "d")
    assert torch.equal(pico.logits(compress.load(small)), pico.logits(compress.load(dense)))
    assert open_checkpoint(dense).spec.tensors["model.layers.0.mlp.up_proj.weight"].kept is not None
    with pytest.raises(CompressError, match=r"needs calibration data; give data="):
        compress.apply("prune_structured", pico_llama, tmp_path / "e", layers=1, compensation="none")
    with pytest.raises(
        CompressError, match=r"prune_unstructured.sparsty: unknown key `sparsty`.*did you mean `sparsity`"
    ):
        compress.apply("prune_unstructured", pico_llama, tmp_path / "e", sparsty=0.5)
    with pytest.raises(
        CompressError, match=r"no pass is called `prune_unstructred`; did you mean `prune_unstructured`?"
    ):
        compress.apply("prune_unstructred", pico_llama, tmp_path / "e", sparsity=0.5)
    with pytest.raises(OutputError):
        compress.apply("cast", pico_llama, tmp_path / "a", weights="bf16")
    details: dict = {}
    swept = compress.apply(
        "prune_unstructured", pico_llama, tmp_path / "f", sparsity=0.5, method="sparsegpt", data=ids, details=details
    )
    assert open_checkpoint(swept).spec.tensors["model.layers.0.mlp.up_proj.weight"].kept == 32 * 64 // 2
    assert [len(block["tensors"]) for block in details["blocks"]] == [7] * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "d", "f"]


@pytest.mark.slow
def test_clean_and_list_runs(recipe, tmp_path):
    from compress.pipeline.housekeeping import clean, list_runs

    compress.run(recipe())
    compress.run(recipe(passes=[{"cast": {"weights": "fp16"}}], gates={}))
    (row,) = list_runs(tmp_path)
    assert row["status"] == "no gates"
    assert [s["used"] for s in row["stages"]].count(True) == 1
    assert len(row["stages"]) == 4
    names, freed = clean(tmp_path / "out", dry_run=True)
    assert [name.partition("-")[2] for name in names] == ["prune_structured", "prune_unstructured", "cast", ""]
    assert names[3].endswith(" old measurements")
    assert freed > 0
    assert clean(tmp_path / "out.run") == (names, freed)
    assert len(list_runs(tmp_path)[0]["stages"]) == 1
    clean(tmp_path / "out.run", everything=True)
    assert not (tmp_path / "out.run").exists()
    load_model(tmp_path / "out")
    with pytest.raises(CompressError, match=r"is not a run folder"):
        clean(tmp_path / "out.run")
