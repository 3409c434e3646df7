"""A training that made nothing better: what the report says, and how the run ends."""

from __future__ import annotations

import json
import sys

import pytest
from safetensors.torch import load_file

from compress.cli import main
from compress.report import load


@pytest.fixture
def run(tmp_path, pico_llama, texts, capsys, monkeypatch):
    """Run, by the command line, a distillation whose rate throws the student far off; status, stdout, report, output."""

    def call(*arguments, distill=None, **changes):
        recipe = {
            "model": str(pico_llama),
            "output": str(tmp_path / "out"),
            "device": "cpu",
            "document_separator": "<|doc|>",
            "data": {"training": {"files": [str(texts[0])], "length": 16}},
            "passes": [
                {"prune_structured": {"layers": [1], "compensation": "none"}},
                {
                    "distill": {
                        "learning_rate": 1.0,
                        "steps": 4,
                        "batch_size": 4,
                        "validation_samples": 4,
                        "evaluate_every": 2,
                        **(distill or {}),
                    }
                },
            ],
            **changes,
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        monkeypatch.setattr(sys, "argv", ["compress", "run", str(tmp_path / "recipe.yaml"), *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capsys.readouterr().out, load(tmp_path / "out.run/report.json"), tmp_path / "out"

    return call


def line(out):
    """The one line of the terminal that says it."""
    found = [text for text in out.splitlines() if text.startswith("distill did not help")]
    assert len(found) == 1, out
    return found[0]


def test_unhelped_run_without_gates_ends_with_3(run):
    status, out, report, output = run()
    assert (status, report["status"], report["exit_status"], report["published"]) == (3, "inconclusive", 3, False)
    training = report["stages"][1]["passes"][0]["details"]["training"]
    held = [row["loss"] for row in training["held_out"]]
    assert len(held) == 3
    assert held[0] < min(held[1:])
    assert line(out).startswith(
        f"distill did not help: the held-out loss was {held[0]:.4g} before training and at best "
    )
    assert f"{min(held[1:]):.4g} after it" in line(out)
    assert not output.exists()
    text = (output.parent / "out.run/report.md").read_text()
    assert "a training did NOT HELP" in text
    assert line(out) in text
    assert (output.parent / "out.run/losses-2.svg").is_file()
    before, after = (load_file(f"{stage['folder']}/model.safetensors") for stage in report["stages"])
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.slow
def test_unhelped_report_is_told_by_gate(run, monkeypatch, capsys):
    *_, output = run()
    monkeypatch.setattr(sys, "argv", ["compress", "gate", str(output.parent / "out.run/report.json")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 3
    assert "no gates, and a training that did not help: inconclusive" in capsys.readouterr().out


@pytest.mark.slow
def test_unhelped_run_is_published_anyway_when_asked(run):
    status, out, report, output = run("--publish-anyway")
    assert (status, report["published"]) == (3, True)
    assert line(out)
    assert (output / "model.safetensors").is_file()


@pytest.mark.slow
def test_unhelped_run_ends_with_0_when_noop_is_allowed(run):
    status, out, report, output = run(distill={"allow_noop": True})
    assert (status, report["status"], report["published"]) == (0, "no gates", True)
    assert line(out)
    assert (output / "model.safetensors").is_file()


@pytest.mark.parametrize(("ratio", "status"), [(0.9, 0), pytest.param(0.1, 1, marks=pytest.mark.slow)])
def test_unhelped_run_with_gates_follows_their_verdict(run, ratio, status):
    found, out, report, output = run(gates={"size": {"max_ratio": ratio}})
    assert found == status
    assert line(out)
    assert output.exists() == (status == 0)
    assert any("did not help" in note for note in report["notes"])
