"""States of a training run: what is not as it was written is none, whatever has happened to it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from compress.training.state import RunState
from compress.workspace import Workspace


@pytest.fixture
def folder(tmp_path):
    """Two states, the second one counts, and the best is the first."""
    state = RunState(Workspace(tmp_path / "training"))
    state.save("best-2", {"w": torch.arange(4.0)})
    state.save("step-2", {"w": torch.arange(4.0), "m": torch.ones(2)}, {"step": 2, "history": {"best_step": 2}})
    state.save("step-4", {"w": torch.arange(4.0) + 1, "m": torch.ones(2)}, {"step": 4, "history": {"best_step": 2}})
    state.keep(["step-4", "best-2"])
    return state.workspace.path


def test_a_state_comes_back(folder):
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
def test_what_was_damaged_is_no_state(damage, folder):
    damage(folder)
    assert RunState(Workspace(folder)).find() is None
