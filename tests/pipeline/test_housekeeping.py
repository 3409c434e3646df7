"""What `clean` and `runs` take for remains, and what they leave alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import compress
from compress import files
from compress.errors import CompressError, OutputError
from compress.pipeline import housekeeping
from compress.pipeline.folder import RunFolder
from tests.toolbox import fork, tree

FAR = 2**22 + 1  # a process number that Linux never gives


# --- what is of somebody else


@pytest.mark.parametrize("names", [["report.json", "photo"], ["stages/album/photo"], ["work/album/photo", "lock"]])
def test_clean_leaves_a_folder_with_only_the_name(small, tmp_path, names):
    mine = tmp_path / "out.run"
    for name in names:
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("mine")
    before = tree(mine)
    for everything in (False, True):
        with pytest.raises(CompressError, match=r"out.run: is not a run folder"):
            housekeeping.clean(mine, everything=everything)
    assert housekeeping.list_runs(tmp_path) == []
    with pytest.raises(OutputError, match=r"out.run: exists and is not a run folder; move it away"):
        compress.run(small())
    assert tree(mine) == before


def test_clean_takes_a_run_folder_without_its_lock(small, tmp_path):
    compress.run(small())
    (tmp_path / "out.run/lock").unlink()
    assert compress.run(small()).nothing_to_do
    (tmp_path / "out.run/lock").unlink()
    assert housekeeping.clean(tmp_path / "out", everything=True)[0] == [str(tmp_path / "out.run")]


def test_clean_follows_dots_as_the_file_system_does(small, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "below").mkdir(parents=True)
        compress.run(small(output=str(tmp_path / name / "out")))
    (tmp_path / "a/link").symlink_to(tmp_path / "b/below")
    housekeeping.clean(tmp_path / "a/link/../out", everything=True)
    assert (tmp_path / "a/out.run").is_dir()
    assert not (tmp_path / "b/out.run").exists()


# --- what dead processes leave


def orphan(folder: Path, name: str) -> Path:
    path = folder / f".{name}.tmp-{FAR}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x" * 1000)
    return path


def test_clean_dry_run_changes_nothing(small, tmp_path):
    compress.run(small())
    run = tmp_path / "out.run"
    half = [
        orphan(run / "stages", "x"),
        orphan(tmp_path, "out"),
        run / "stages/half",
        run / f".report.json.tmp-{FAR}-0",
    ]
    half[2].mkdir()
    half[3].write_text("{")
    for removed in ("lock", None):
        if removed is not None:
            (run / removed).unlink()
        before = tree(tmp_path)
        names, freed = housekeeping.clean(run, dry_run=True)
        assert set(names) == {path.name for path in half}
        assert freed > 2000
        housekeeping.clean(run, everything=True, dry_run=True)
        housekeeping.list_runs(tmp_path)
        assert tree(tmp_path) == before
    assert housekeeping.clean(run) == (names, freed)
    assert not any(path.exists() for path in half)
    assert (tmp_path / "out").is_dir()


def test_clean_takes_orphans(small, tmp_path):
    compress.run(small())
    left = orphan(tmp_path, "out")
    (row,) = housekeeping.list_runs(tmp_path)
    assert row["leftovers"] == [{"name": left.name, "bytes": 1000}]
    assert compress.run(small()).nothing_to_do
    assert not left.exists()
    alone = orphan(tmp_path / "elsewhere", "dense")
    rows = housekeeping.list_runs(tmp_path)
    assert [r["leftovers"] for r in rows if r["run"] == str(alone)] == [[{"name": alone.name, "bytes": 1000}]]
    assert housekeeping.clean(alone, dry_run=True) == ([str(alone)], 1000)
    assert housekeeping.clean(tmp_path / "elsewhere/dense") == ([alone.name], 1000)
    assert not alone.exists()
    alone = orphan(tmp_path / "elsewhere", "dense")
    compress.unpack(tmp_path / "out", tmp_path / "elsewhere/dense")
    assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == ["dense"]


def test_clean_leaves_what_a_living_process_writes(tmp_path):
    with files.temporary(tmp_path / "out") as temp:
        assert files.leftovers(tmp_path) == []
        stranger = temp.rename(tmp_path / f".out.tmp-{FAR}")  # the number is of another machine: the lock counts
        assert files.leftovers(tmp_path) == []
        files.remove_leftovers(tmp_path / "out")
        assert stranger.is_dir()
    assert files.leftovers(tmp_path) == [stranger]


@pytest.mark.slow
def test_clean_takes_work_of_another_recipe(recipe, tmp_path):
    passes = [{"prune_unstructured": {"method": "sparsegpt", "sparsity": "60%", "effort": "fast"}}]

    def work():
        RunFolder.finish = lambda *a, **k: os._exit(9)
        compress.run(recipe(passes=passes, gates=None))

    assert fork(work) == 9
    (left,) = (tmp_path / "out.run/work").iterdir()
    (row,) = housekeeping.list_runs(tmp_path)
    assert row["status"] is None
    half = [left.name, f"{left.name}.inputs.safetensors"]  # the half stage; its work goes on
    assert sorted(housekeeping.clean(tmp_path / "out", dry_run=True)[0]) == half
    compress.run(recipe(passes=[{"cast": {"weights": "bf16"}}], gates=None))
    (row,) = housekeeping.list_runs(tmp_path)
    assert [u["name"] for u in row["leftovers"]] == [f"work/{left.name}"]
    names, freed = housekeeping.clean(tmp_path / "out")
    assert names == [f"work/{left.name}"]
    assert freed > 10_000
    assert not left.exists()
