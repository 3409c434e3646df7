"""States of a training run: what is not as it was written is none, whatever has happened to it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from compress.errors import ResourceError
from compress.training import state as states
from compress.training.state import RunState, UnusableState
from compress.workspace import Workspace
from tests.toolbox import data_file


@pytest.fixture
def folder(tmp_path):
    """Two states, the second one counts, and the best is the first."""
    state = RunState(Workspace(tmp_path / "training"))
    state.save("best-2", {"w": torch.arange(4.0)})
    state.save("step-2", {"w": torch.arange(4.0), "m": torch.ones(2)}, {"step": 2, "history": {"best_step": 2}})
    state.save("step-4", {"w": torch.arange(4.0) + 1, "m": torch.ones(2)}, {"step": 4, "history": {"best_step": 2}})
    state.keep(["step-4", "best-2"])
    return state.workspace.path


def test_state_round_trips(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["best-2", "step-4", "train.json"]
    state = RunState(Workspace(folder))
    found = state.find()
    assert (found["step"], found["state"], sorted(found["states"])) == (4, "step-4", ["best-2", "step-4"])
    tensors = {"w": torch.zeros(4), "m": torch.zeros(2)}
    state.load("step-4", tensors)
    assert torch.equal(tensors["w"], torch.arange(4.0) + 1)
    state.save("step-6", tensors, {"step": 6, "history": {"best_step": 2}})  # goes on: the best one is still known
    assert sorted(RunState(Workspace(folder)).find()["states"]) == ["best-2", "step-6"]


def gone(folder: Path) -> None:
    shutil.rmtree(folder / "best-2")


def half_removed(folder: Path) -> None:
    next((folder / "best-2").glob("*.distcp")).unlink()


def flipped(folder: Path) -> None:
    path = next((folder / "step-4").glob("*.distcp"))
    data, info = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def metadata(folder: Path) -> None:
    (folder / "step-4/.metadata").write_bytes(b"[" * 1000)


def a_folder(folder: Path) -> None:
    path = next((folder / "step-4").glob("*.distcp"))
    path.unlink()
    path.mkdir()


def note_says(text: str):
    def damage(folder: Path) -> None:
        (folder / "train.json").write_text(text)

    damage.__name__ = text[:12]
    return damage


def step_changed(folder: Path) -> None:
    note = json.loads((folder / "train.json").read_text())
    note["data"]["value"]["step"] = 400
    (folder / "train.json").write_text(json.dumps(note))


NOTES = [note_says(text) for text in ("", "[]", "{}", "[" * 20000, '{"step": 4, "state": "step-4"}', "\ufeff{}")]


@pytest.mark.parametrize(
    "damage", [gone, half_removed, flipped, metadata, a_folder, step_changed, *NOTES], ids=lambda d: d.__name__
)
def test_state_is_absent_when_damaged(damage, folder):
    damage(folder)
    assert RunState(Workspace(folder)).find() is None


SAID = {"history": {"best_step": 2}, "scaler": {}}


def tensors(value):
    return {"a": torch.full((8, 8), float(value)), "b": torch.full((3,), value, dtype=torch.bfloat16)}


@pytest.fixture
def saved(tmp_path):
    """States of steps 2 and 4, the best weights of step 2."""
    state = RunState(Workspace(tmp_path / "training"))
    state.save("best-2", tensors(2))
    for step in (2, 4):
        state.save(f"step-{step}", tensors(step), {**SAID, "step": step})
    return state


def test_state_that_does_not_load_raises_unusable(saved):
    file = data_file(saved.workspace.path / "step-4")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UnusableState, match="the training state step-4 does not load"):
        saved.load("step-4", tensors(0))
    with pytest.raises(UnusableState):
        saved.load("step-2", {**tensors(0), "c": torch.zeros(1)})


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_state_metadata_runs_no_code(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (saved.workspace.path / "step-4/.metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UnusableState):
        saved.load("step-4", tensors(0))
    assert not (tmp_path / "evil").exists()


def test_state_hides_no_signal_or_full_disk(saved, monkeypatch):
    """torch wraps whatever happens into an exception of its own."""

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "x")

    with monkeypatch.context() as patch:
        patch.setattr(states._Reader, "read_data", stop)
        with pytest.raises(KeyboardInterrupt):
            saved.load("step-4", tensors(0))
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data", full)
    with pytest.raises(ResourceError):
        saved.save("step-6", tensors(6), {**SAID, "step": 6})
    assert saved.find()["step"] == 4
