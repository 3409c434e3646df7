"""What a run makes of states that are damaged, and what reading one may do."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.progress import SilentProgress
from compress.workspace import Workspace
from tests.toolbox import data_file


class Stop(Exception):
    pass


class StopsAt(SilentProgress):
    """Ends a run when a message or a step of training says so."""

    def __init__(self, looks, title="training"):
        self.messages, self.looks, self.title = [], looks, title

    def message(self, text):
        self.messages.append(text)

    def task(self, title, total=None, unit="tensors"):
        inner = super().task(title, total, unit)
        if title != self.title or self.looks is None:
            return inner
        progress = self

        class PausedTask:
            def __enter__(self):
                self.inner = inner.__enter__()
                return self

            def __exit__(self, *args):
                return inner.__exit__(*args)

            def advance(self, *args, **kwargs):
                self.inner.advance(*args, **kwargs)
                progress.looks -= 1
                if not progress.looks:
                    raise Stop

        return PausedTask()


@pytest.fixture(scope="module")
def recipe(pico_llama, texts):
    return {
        "model": str(pico_llama),
        "device": "cpu",
        "document_separator": "<|doc|>",
        "data": {"training": {"files": [str(texts[0])], "length": 16}},
        "passes": [
            {
                "distill": {
                    "student": {"layers": 2},
                    "learning_rate": 3e-3,
                    "steps": 6,
                    "batch_size": 4,
                    "validation_samples": 4,
                    "evaluate_every": 2,
                }
            }
        ],
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory, recipe):
    folder = tmp_path_factory.mktemp("whole")
    compress.run({**recipe, "output": str(folder / "out")})
    return load_file(folder / "out/model.safetensors")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, recipe):
    """A run that was stopped at step 5 of 6."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stop):
        compress.run({**recipe, "output": str(folder / "out")}, progress=StopsAt(5))
    return folder


RUINED = {
    "nothing": (lambda training: None, "training continues from step 4"),
    "best weights gone": (lambda training: shutil.rmtree(training / "best-4"), None),
    "half-removed state": (lambda training: data_file(training / "step-4").unlink(), None),
    "zeros in the state": (lambda training: zero(training / "step-4"), None),
    "zeros in the best weights": (lambda training: zero(training / "best-4"), None),
    "a record of another version": (
        lambda training: foreign(training / "train.json"),
        "step-4 does not load: training begins",
    ),
    "damaged record": (lambda training: (training / "train.json").write_text("{"), None),
}


def foreign(record):
    workspace = Workspace(record.parent)
    value = workspace.read_json("train")
    value["history"]["unknown"] = 1
    workspace.write_json("train", value)


def zero(folder):
    file = data_file(folder)
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.slow
@pytest.mark.parametrize("what", RUINED)
def test_run_resumes_when_state_is_damaged(tmp_path, recipe, expected, stopped, what):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (training,) = (tmp_path / "out.run").rglob("training")
    assert sorted(p.name for p in training.iterdir()) == ["best-4", "step-4", "train.json"]
    damage, message = RUINED[what]
    damage(training)
    progress = StopsAt(None)
    compress.run({**recipe, "output": str(tmp_path / "out")}, progress=progress)
    assert message is None or any(message in text for text in progress.messages), progress.messages
    assert message is not None or not any("goes on" in text for text in progress.messages)
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_run_trains_again_when_best_weights_do_not_load(tmp_path, recipe, expected):
    """The run was stopped after its last step, before the stage was written."""
    recipe = {**recipe, "output": str(tmp_path / "out")}
    with pytest.raises(Stop):
        compress.run(recipe, progress=StopsAt(1, "writing"))
    (training,) = (tmp_path / "out.run").rglob("training")
    assert sorted(p.name for p in training.iterdir()) == ["best-6", "step-6", "train.json"]
    zero(training / "best-6")
    progress = StopsAt(None)
    compress.run(recipe, progress=progress)
    found = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
