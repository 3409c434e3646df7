"""The workspace of a stage: values are computed once, files appear whole or not at all, damage counts as absence."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from compress.distributed import ProcessGroup
from compress.workspace import Workspace
from tests.test_distributed import world


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "work")


def never():
    raise AssertionError("computed again")


def test_cached_computes_once(workspace):
    value = workspace.cached("scores", lambda: {"rows": [(1, 0.1)], "none": None, 3: float("inf")})
    assert value == {"rows": [[1, 0.1]], "none": None, "3": float("inf")}
    assert Workspace(workspace.path).cached("scores", never) == value
    assert workspace.cached("scores", lambda: 2, fresh=True) == 2
    assert workspace.cached("scores", never) == 2


@pytest.mark.parametrize("value", [None, False, 0, []])
def test_cached_keeps_empty_values(workspace, value):
    workspace.cached("empty", lambda: value)
    assert workspace.cached("empty", never) == value


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def changed(path):
    path.write_text(path.read_text().replace("41", "42"))


def another_name(path):
    path.rename(path.with_name("kept.json"))
    Workspace(path.parent).write_json("other", 41)
    path.with_name("other.json").rename(path)


def plain_json(path):
    path.write_text(json.dumps({"next": 41}))  # of an earlier version


def a_folder(path):
    path.unlink()
    (path / "x").mkdir(parents=True)


@pytest.mark.parametrize("damage", [cut, changed, another_name, plain_json, a_folder])
def test_damaged_record_is_absent(workspace, damage):
    workspace.write_json("state", 41)
    damage(workspace.file("state.json"))
    assert workspace.read_json("state") is None
    assert workspace.cached("state", lambda: 7) == 7
    assert workspace.read_json("state") == 7


def test_record_of_another_kind_is_absent(workspace):
    workspace.write_json("state", 41)
    assert Workspace(workspace.path, kind="compress.other/1").read_json("state") is None


def test_done_after_finish(workspace):
    assert not workspace.done("gradients")
    workspace.finish("gradients")
    assert workspace.done("gradients")
    assert not workspace.folder("part").done("gradients")


def test_save_tensors_replaces_whole(workspace, monkeypatch):
    """A process that ends before the new file takes its place leaves the old one."""
    workspace.save_tensors("block", {"w": torch.ones(3)})
    process = os.fork()
    if process == 0:
        monkeypatch.setattr("compress.files.put", lambda temp, path: os._exit(9))
        workspace.save_tensors("block", {"w": torch.zeros(3)})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert torch.equal(load_file(workspace.tensors("block"))["w"], torch.ones(3))
    workspace.save_tensors("block", {"w": torch.zeros(3)})
    assert torch.equal(load_file(workspace.tensors("block"))["w"], torch.zeros(3))


def test_failed_write_leaves_nothing(workspace):
    with pytest.raises(ValueError, match="contiguous"):
        workspace.save_tensors("block", {"w": torch.ones(3, 4).T})
    assert list(workspace.path.iterdir()) == []


def test_new_folder_appears_whole(workspace):
    for text in ("old", "new"):
        with workspace.new_folder("state") as temp:
            temp.mkdir()
            (temp / "x").write_text(text)
        assert (workspace.file("state") / "x").read_text() == text

    def fill():
        with workspace.new_folder("state") as temp:
            temp.mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert [p.name for p in workspace.path.iterdir()] == ["state"]
    workspace.keep_folders([])
    assert list(workspace.path.iterdir()) == []


def test_remove_deletes_only_its_entry(workspace):
    workspace.folder("part").write_json("x", 1)
    workspace.folder("part").remove()
    assert list(workspace.path.iterdir()) == []
    workspace.folder("part").remove()


def test_alone_has_one_process(tmp_path):
    two = Workspace(tmp_path, ProcessGroup(1, 2))
    assert two.alone().processes == ProcessGroup()
    assert two.alone().folder("x").processes == ProcessGroup()
    assert two.folder("x").processes.world == 2


TOGETHER = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from compress.distributed import ProcessGroup
from compress.workspace import Workspace
dist.init_process_group("gloo")
processes = ProcessGroup(dist.get_rank(), dist.get_world_size())
workspace = Workspace(Path(sys.argv[1]), processes)
first = workspace.cached("value", lambda: [processes.rank, "computed"])
assert workspace.cached("value", lambda: 1 / 0) == first == [0, "computed"], first
workspace.save_tensors("t", {"rank": torch.tensor(processes.rank)})
assert not workspace.done("all")
workspace.finish("all")
assert workspace.done("all")
workspace.folder("part").write_json("x", processes.rank)
assert workspace.folder("part").read_json("x") == 0
workspace.folder("part").remove()
assert not workspace.file("part").exists()
print("same")
dist.destroy_process_group()
"""


def test_shared_values_are_those_of_the_first_process(tmp_path):
    assert world(TOGETHER, tmp_path / "work").split() == ["same"]
    names = ["all.json", "t.safetensors", "value.json"]
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == names
    assert load_file(tmp_path / "work/t.safetensors")["rank"] == 0
