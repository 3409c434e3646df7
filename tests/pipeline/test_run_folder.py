"""What a run folder and an output may have become since: damaged, changed, linked elsewhere, left by a dead process."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import compress
from compress import files
from compress.checkpoint.open import open_headers
from compress.errors import CheckpointError, CompressError, OutputError
from compress.pipeline import housekeeping
from compress.pipeline.folder import RunFolder
from compress.workspace import Workspace
from tests.toolbox import flip, fork, tree

# --- published results


@pytest.mark.parametrize("hidden", [False, True])
def test_run_keeps_a_result_changed_at_equal_size(small, tmp_path, hidden):
    compress.run(small())
    file = tmp_path / "out/model.safetensors"
    info = file.stat()
    data = flip(file)
    if hidden:
        os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (info.st_size, info.st_mtime_ns)
    for change in ({}, {"passes": [{"cast": {"weights": "fp16"}}]}):
        with pytest.raises(OutputError, match=r"model.safetensors was changed or added since it was published; move"):
            compress.run(small(**change))
        assert file.read_bytes() == data
    shutil.rmtree(tmp_path / "out.run")  # without what the run folder knows of it
    with pytest.raises(OutputError, match=r"model.safetensors was changed or added since it was published"):
        compress.run(small())
    assert file.read_bytes() == data


def test_run_recognizes_a_copied_or_touched_result(small, tmp_path):
    first = compress.run(small())
    os.utime(tmp_path / "out/model.safetensors")
    assert compress.run(small()).nothing_to_do
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "copy").rename(tmp_path / "out")
    again = compress.run(small())
    assert again.nothing_to_do
    assert again.report == first.report
    other = compress.run(small(passes=[{"cast": {"weights": "fp16"}}]))
    assert other.published
    provenance = json.loads((tmp_path / "out/compress.json").read_text())
    assert provenance["passes"][0]["settings"]["weights"] == "fp16"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_run_rejects_a_changed_provenance_or_report(small, tmp_path):
    compress.run(small(gates={"size": {"max_ratio": 0.1}}), publish_anyway=True)
    report = tmp_path / "out.run/report.json"
    said = json.loads(report.read_text())
    assert said["exit_status"] == 1
    report.write_text(json.dumps({**said, "exit_status": 0, "status": "passed"}))
    again = compress.run(small(gates={"size": {"max_ratio": 0.1}}))
    assert not again.nothing_to_do
    assert again.exit_status == 1
    compress.run(small())
    provenance = tmp_path / "out/compress.json"
    provenance.write_text(provenance.read_text().replace("bf16", "fp16"))
    with pytest.raises(OutputError, match=r"compress.json was changed since it was published"):
        compress.run(small())


# --- stages


def test_run_does_not_publish_a_changed_stage(small, tmp_path):
    gates = {"gates": {"size": {"max_ratio": 0.1}}}
    compress.run(small(**gates))
    (stage,) = (p for p in (tmp_path / "out.run/stages").iterdir() if p.is_dir())
    right = (stage / "model.safetensors").read_bytes()
    flip(stage / "model.safetensors")
    record = stage.with_name(stage.name + ".json")
    data = files.read_record(record, "compress.stage/2")  # a disk that rots changes no times
    data["files"]["model.safetensors"]["stamp"] = files.stamp((stage / "model.safetensors").stat())
    files.write_record(record, "compress.stage/2", data)
    result = compress.run(small(**gates), publish_anyway=True)
    assert not result.report["stages"][0]["reused"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == right


def test_run_does_not_publish_a_stage_changed_meanwhile(small, tmp_path, monkeypatch):
    from compress.pipeline import run as module

    real = module.close

    def late(state, report, identity):
        flip(Path(report["stages"][-1]["folder"]) / "model.safetensors")
        real(state, report, identity)

    monkeypatch.setattr(module, "close", late)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not what was written; check the disk"):
        compress.run(small())
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert compress.run(small()).published


@pytest.mark.slow
def test_stage_record_is_written_before_work_is_removed(recipe, tmp_path):
    """A kill leaves a finished stage its record, or an unfinished one its work."""
    passes = [{"prune_unstructured": {"method": "sparsegpt", "sparsity": "60%", "effort": "fast"}}]
    changes = {"passes": passes, "gates": None, "evaluate": []}
    compress.run(recipe(**changes, output=str(tmp_path / "unbroken")))
    right = (tmp_path / "unbroken/model.safetensors").read_bytes()

    def killed_at(module, name):
        def work():
            setattr(module, name, lambda *a, **k: os._exit(9))
            compress.run(recipe(**changes))

        assert fork(work) == 9

    from compress.pipeline import stages as module

    killed_at(RunFolder, "finish")  # the stage stands, its record does not
    (work,) = (tmp_path / "out.run/work").iterdir()
    assert len(list(work.glob("blocks/*.safetensors"))) == 4
    killed_at(module, "remove")  # the record stands, the work is still there
    assert work.is_dir()
    assert (tmp_path / "out.run/stages" / f"{work.name}.json").exists()
    result = compress.run(recipe(**changes))
    assert result.report["stages"][0]["reused"]
    assert not any((tmp_path / "out.run/work").iterdir())
    assert (tmp_path / "out/model.safetensors").read_bytes() == right


@pytest.mark.slow
def test_stage_begins_anew_when_state_is_unusable(recipe, tmp_path):
    """The stage begins anew, with the bytes of an unbroken run. State that fails is set aside; no record is not a state."""
    passes = [{"prune_unstructured": {"method": "sparsegpt", "sparsity": "60%", "effort": "fast"}}]
    changes = {"passes": passes, "gates": None, "evaluate": []}
    compress.run(recipe(**changes, output=str(tmp_path / "unbroken")))
    right = (tmp_path / "unbroken/model.safetensors").read_bytes()

    def work():
        RunFolder.finish = lambda *a, **k: os._exit(9)
        compress.run(recipe(**changes))

    assert fork(work) == 9
    shutil.copytree(tmp_path / "out.run", tmp_path / "kept")
    for damage in ("cut", "other state", "earlier version"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / "out.run")
        shutil.copytree(tmp_path / "kept", tmp_path / "out.run")
        (left,) = (tmp_path / "out.run/work").iterdir()
        if damage == "cut":
            for path in left.rglob("*.safetensors"):
                path.write_bytes(path.read_bytes()[:50])
        elif damage == "other state":
            Workspace(left).write_json("state", {"next": "x"})
        else:
            (left / "state.json").write_text('{"next": 2, "details": []}')
        assert compress.run(recipe(**changes)).published
        assert (tmp_path / "out/model.safetensors").read_bytes() == right
        unusable = [f"work/{left.name}.unusable"] * (damage != "earlier version")
        assert housekeeping.clean(tmp_path / "out")[0] == unusable, damage


def test_remove_renames_first(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_text("x")

    def killed():
        files.shutil.rmtree = lambda *a, **k: os._exit(9)
        files.remove(tmp_path / "a")

    assert fork(killed) == 9
    (left,) = tmp_path.iterdir()
    assert files.leftovers(tmp_path) == [left]
    files.remove_leftovers(tmp_path / "a")
    assert not list(tmp_path.iterdir())


# --- damage


def damages(path: Path) -> dict[str, object]:
    text = path.read_text()
    return {
        "list": lambda: path.write_text("[]"),
        "other keys": lambda: path.write_text('{"x": 1}'),
        "cut": lambda: path.write_text(text[: len(text) // 2]),
        "deep": lambda: path.write_text("[" * 100_000),
        "number changed": lambda: path.write_text(text.replace("1", "2", 1)),
        "a folder": lambda: (path.unlink(), (path / "x").mkdir(parents=True)),
    }


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind == "cut" else [pytest.mark.slow]) for kind in damages(Path(__file__))],
)
def test_run_folder_is_made_anew_when_damaged(recipe, tmp_path, kind):
    data = recipe()["data"]
    data["evaluation"]["max_documents"] = 2
    changes = {"passes": [{"cast": {"weights": "bf16"}}], "data": data}
    first = compress.run(recipe(**changes))
    run = tmp_path / "out.run"
    records = [*run.glob("*.json"), *run.glob("stages/*.json"), *run.glob("measurements/*.json")]
    assert len(records) == 7
    for path in records:
        damages(path)[kind]()
    again = compress.run(recipe(**changes))
    assert not again.nothing_to_do
    assert again.exit_status == 0
    assert again.report["result"] == first.report["result"]
    assert compress.run(recipe(**changes)).nothing_to_do


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff\xfe\x00", b"null", b"3", b"{}", b'{"schema": "k", "sha256": [], "data": []}', b'{"schema": "k", "data": {}}',
     b"[" * 100_000, b'{"schema": "k", "sha256": "0", "data": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}", b"1" * 5000],
)  # fmt: skip
def test_record_is_none_when_damaged(tmp_path, text):
    path = tmp_path / "r.json"
    files.write_record(path, "k", {"a": (1, float("inf")), 2: None})
    assert files.read_record(path, "k") == {"a": [1, float("inf")], "2": None}
    assert files.read_record(path, "other") is None
    path.write_bytes(text)
    assert files.read_record(path, "k") is None
    path.unlink()
    os.mkfifo(path)
    assert files.read_record(path, "k") is None
    path.unlink()
    files.write_record(tmp_path / "real", "k", {})
    path.symlink_to(tmp_path / "real")
    assert files.read_record(path, "k") is None
    assert files.read_record(path / "x", "k") is None


def test_run_replaces_files_in_place_of_folders(small, tmp_path):
    run = tmp_path / "out.run"
    run.mkdir()
    for name in ("stages", "work", "measurements"):
        (run / name).write_text("x")
    (run / "lock").mkdir()
    RunFolder(run).set_current([])
    assert compress.run(small()).published
    shutil.rmtree(run)
    run.write_text("mine")
    with pytest.raises(OutputError, match=r"out.run: is not a folder"):
        compress.run(small())
    assert run.read_text() == "mine"


def test_run_reads_sizes_from_disk(small, tmp_path):
    gates = {"gates": {"size": {"max_ratio": 0.3}}}
    assert compress.run(small(**gates)).exit_status == 1
    (record,) = (tmp_path / "out.run/stages").glob("*.json")
    data = files.read_record(record, "compress.stage/2")
    data["size"]["bytes"] = data["passes"][-1]["actual"]["bytes"] = 100
    files.write_record(record, "compress.stage/2", data)
    again = compress.run(small(**gates))
    assert again.report["stages"][0]["reused"]
    assert (again.exit_status, again.report["result"]["size"]["bytes"] > 100) == (1, True)
    assert again.report["stages"][0]["passes"][-1]["actual"] == again.report["result"]["size"]


def test_measurement_counts_only_for_what_it_measured(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.cached("stage-a", lambda: {"evaluation": 1}) == {"evaluation": 1}
    assert folder.cached("stage-a", lambda: {"evaluation": 2}) == {"evaluation": 1}
    shutil.copy(tmp_path / "measurements/stage-a.json", tmp_path / "measurements/stage-b.json")
    assert folder.cached("stage-b", lambda: {"evaluation": 2}) == {"evaluation": 2}


@pytest.mark.parametrize("link", [False, True])
def test_run_leaves_a_folder_named_like_an_earlier_result(small, tmp_path, link):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo").write_text("photo")
    old = tmp_path / ".out.old"
    old.symlink_to("mine") if link else (tmp_path / "mine").rename(old)
    for change in ({}, {"passes": [{"cast": {"weights": "fp16"}}]}):
        assert compress.run(small(**change)).published
        assert (old / "photo").read_text() == "photo"
        assert old.is_symlink() == link


@pytest.mark.parametrize("name", [".", "..", "/", "below/.."])
def test_run_refuses_a_path_that_names_no_folder(small, tmp_path, pico_llama, monkeypatch, name):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    for work in (
        lambda: compress.run(small(output=name)),
        lambda: compress.unpack(pico_llama, name),
        lambda: compress.apply("cast", pico_llama, name, weights="bf16"),
    ):
        with pytest.raises(OutputError, match=r"names no folder of its own; give the folder's name"):
            work()
    with pytest.raises(CompressError, match=r"names no run folder"):
        housekeeping.clean(Path(name))


def test_run_expands_a_tilde_in_an_output(small, tmp_path, pico_llama, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert compress.run(small(output="~/out")).checkpoint == tmp_path / "home/out"
    assert compress.unpack(pico_llama, "~/dense") == tmp_path / "home/dense"
    for work in (
        lambda: compress.run(small(output="~nosuchuser/out")),
        lambda: compress.unpack(pico_llama, "~nosuchuser/out"),
    ):
        with pytest.raises(CompressError, match="there is no such user"):
            work()
    assert not list(tmp_path.glob("~*"))


def test_run_refuses_a_mount_point(small, tmp_path, monkeypatch):
    """As a volume of a container is; found before any work, not when the result is to be put there."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "out")
    with pytest.raises(OutputError, match=r"out: is a mount point, .*; name a folder inside it"):
        compress.run(small())
    assert not (tmp_path / "out.run").exists()


# --- links


@pytest.mark.parametrize("name", ["", "stages", "lock", "measurements", "work", "work/x", "report.json", "stages/x/y"])
def test_run_refuses_links_in_a_run_folder(small, tmp_path, name):
    mine, run = tmp_path / "mine", tmp_path / "out.run"
    (mine / "album").mkdir(parents=True)
    (mine / "album/photo").write_text("photo")
    (mine / "file").write_text("mine")
    place = run / name if name else run
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(mine / "file" if name in ("lock", "report.json") else mine)
    (run / "stages").mkdir(exist_ok=True)
    if name:
        RunFolder(run).set_current([])
    before = tree(mine)
    for work in (
        lambda: compress.run(small()),
        lambda: housekeeping.clean(run, dry_run=True),
        lambda: housekeeping.clean(run, everything=True),
    ):
        with pytest.raises(OutputError, match=r"is a symbolic link"):
            work()
    assert tree(mine) == before


def test_run_does_not_write_a_hard_linked_lock(small, tmp_path):
    (tmp_path / "out.run").mkdir()
    (tmp_path / "mine").write_text("mine")
    os.link(tmp_path / "mine", tmp_path / "out.run/lock")
    RunFolder(tmp_path / "out.run").set_current([])
    compress.run(small())
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["README.md", "compress.json", "modeling_compress.py", "generation_config.json"])
def test_run_refuses_links_out_of_a_checkpoint(small, tmp_path, pico_llama, name):
    (tmp_path / "secret").write_text("a key")
    model = Path(shutil.copytree(pico_llama, tmp_path / "model"))
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "secret")
    for work in (
        lambda: compress.run(small(model=str(model))),
        lambda: compress.unpack(model, tmp_path / "dense"),
        lambda: compress.apply("cast", model, tmp_path / "cast", weights="bf16"),
    ):
        with pytest.raises(CheckpointError, match=rf"{name}: is a symbolic link to .*secret, outside the checkpoint"):
            work()
    assert not any((tmp_path / place).exists() for place in ("out", "dense", "cast"))


def test_run_follows_links_that_are_allowed(small, tmp_path, pico_llama):
    """Weights, tokenizer and a linked folder lie elsewhere; without the key the run is refused, and the error names it."""
    elsewhere = Path(shutil.copytree(pico_llama, tmp_path / "elsewhere"))
    (elsewhere / "more").mkdir()
    (elsewhere / "more" / "notes.txt").write_text("notes")
    (elsewhere / "more" / "loop").symlink_to(elsewhere)
    model = tmp_path / "model"
    model.mkdir()
    for path in elsewhere.iterdir():
        (model / path.name).symlink_to(path)
    (model / "around").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a symbolic link to .*set allow_links: true if you made the link"):
        compress.run(small(model=str(model)))
    compress.run(small(model=str(model), allow_links=True))
    names = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert Path("more/notes.txt") in names
    assert not (tmp_path / "out" / "around").exists()
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    assert open_headers(tmp_path / "out")[0].tensors.keys() == open_headers(elsewhere)[0].tensors.keys()
    assert compress.load(model, allow_links=True).config.model_type == "llama"
    with pytest.raises(CheckpointError, match="allow_links"):
        compress.load(model)


def test_lock_survives_the_removal_of_its_folder(tmp_path):
    folder = RunFolder(tmp_path / "out.run")
    with folder.locked():
        files.remove(folder.path)
        with (
            folder.locked(),
            pytest.raises(OutputError, match=rf"another run is working on this output \(process {os.getpid()}\)"),
        ):
            folder.check_idle()
    folder.check_idle()


# --- report and card


@pytest.mark.slow
@pytest.mark.parametrize("front", ["tags: [{a: b}]", "tags: " + "[" * 1500])
def test_run_drops_front_matter_that_cannot_be_carried_over(small, tmp_path, pico_llama, front):
    model = Path(shutil.copytree(pico_llama, tmp_path / "model"))
    (model / "README.md").write_text(f"---\n{front}\n---\n# Mine\n")
    assert compress.run(small(model=str(model))).published
    assert "## Bytes saved and quality lost by each pass" in (tmp_path / "out/README.md").read_text()


def test_run_ends_well_when_the_report_cannot_be_rendered(small, tmp_path, monkeypatch):
    from compress import report as reports

    def broken(report):
        raise KeyError("error")

    gates = {"gates": {"size": {"max_ratio": 0.1}}}
    with monkeypatch.context() as patch:
        for name in ("render_markdown", "render_junit", "render_pictures"):
            patch.setattr(reports, name, broken)
        patch.setattr(reports, "model_card", lambda *a, **k: broken(a))
        result = compress.run(small(**gates), publish_anyway=True)
    assert (result.exit_status, result.published) == (1, True)
    assert "report.md could not be made and is left out: KeyError: 'error'" in result.report["notes"]
    assert json.loads((tmp_path / "out.run/report.json").read_text())["notes"] == result.report["notes"]
    assert not (tmp_path / "out.run/report.md").exists()
    assert not (tmp_path / "out/README.md").exists()
    again = compress.run(small(**gates))
    assert (again.nothing_to_do, again.exit_status) == (True, 1)
    assert (tmp_path / "out.run/report.md").read_text().startswith("#")


def test_run_reports_file_system_errors_in_one_line(small, tmp_path):
    long = str(tmp_path / ("x" * 300))
    for work in (
        lambda: compress.run(small(output=long)),
        lambda: compress.load(long),
        lambda: compress.unpack(long, tmp_path / "dense"),
        lambda: compress.apply("cast", small()["model"], long, weights="bf16"),
    ):
        with pytest.raises(CompressError, match="File name too long") as caught:
            work()
        assert caught.value.exit_status == 2
