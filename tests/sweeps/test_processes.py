"""Sweeps of several processes: kills, joining, jobs. Trials are real runs on a pico model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter

import pytest

from compress.sweeps.run import run_sweep
from tests import processes
from tests.conftest import ROOT
from tests.sweeps.conftest import in_process

pytestmark = pytest.mark.slow

BEGIN = """
import json, sys
from compress.sweeps.run import run_sweep
from tests.sweeps.conftest import in_process
run_sweep(json.loads(sys.argv[1]), runner=in_process)
"""
JOIN = """
import sys
from pathlib import Path
from compress.sweeps.run import join_sweep
from tests.sweeps.conftest import in_process
join_sweep(Path(sys.argv[1]), runner=in_process)
"""


def events(folder):
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def twelve(sweep, folder):
    mapping = sweep(folder)
    mapping["passes"][0]["prune_unstructured"]["sparsity"] = {"search": {"from": "30%", "to": "60%", "step": "10%"}}
    mapping["data"]["evaluation"]["max_documents"] = 2
    return mapping


def test_killed_sweep_ends_with_the_same_trials_and_front(sweep, tmp_path):
    first = processes.run(BEGIN, json.dumps(twelve(sweep, tmp_path / "whole")))
    assert first.returncode == 0, first.stderr
    expected = json.loads((tmp_path / "whole/out.sweep/sweep.json").read_text())
    assert len(expected["trials"]) == 12
    assert sum(trial["reused"] for trial in expected["trials"]) == 12 - 4
    mapping, folder = json.dumps(twelve(sweep, tmp_path)), tmp_path / "out.sweep"
    process = processes.Process(BEGIN, mapping)
    while not (folder / "journal.jsonl").exists() or sum(e["event"] == "begun" for e in events(folder)) < 6:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert len(events(folder)) < 24
    again = processes.run(BEGIN, mapping)
    assert again.returncode == 0, again.stderr
    made = json.loads((folder / "sweep.json").read_text())
    assert made["front"] == expected["front"]
    assert [t["goals"] for t in made["trials"]] == [t["goals"] for t in expected["trials"]]
    assert Counter(e["event"] for e in events(folder)) == {"begun": 12, "ended": 12}


def test_joined_processes_never_run_a_trial_twice(sweep, tmp_path):
    folder = tmp_path / "out.sweep"
    first = processes.Process(BEGIN, json.dumps(twelve(sweep, tmp_path)))
    while not (folder / "journal.jsonl").exists() or not events(folder):
        assert first.poll() is None
        time.sleep(0.02)
    second = processes.Process(JOIN, folder)
    for process in (first, second):
        err = process.communicate(300)[1]
        assert process.wait() == 0, err
    begun = [event for event in events(folder) if event["event"] == "begun"]
    assert sorted(event["trial"] for event in begun) == list(range(1, 13))
    assert len({event["by"] for event in begun}) == 2
    made = json.loads((folder / "sweep.json").read_text())
    assert all(trial["state"] == "done" for trial in made["trials"])
    computed = sum(2 - trial["reused"] for trial in made["trials"])
    assert computed == 4 + 12  # a stage that one computes the other one waits for


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "compress", "sweep", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,
    )


def recipe(sweep, tmp_path, sparsity="50%"):
    mapping = sweep(tmp_path)
    mapping["passes"][0]["prune_unstructured"]["sparsity"] = sparsity
    mapping["passes"][1]["cast"]["weights"] = {"search": ["int8", "int4"]}
    mapping["threads"] = 1
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(mapping))
    return path


def test_command_runs_each_trial_as_a_process(sweep, tmp_path):
    path = recipe(sweep, tmp_path)
    done = command(path, "--quiet")
    assert done.returncode == 0, done.stderr
    assert "2 trials: 2 ran" in done.stdout
    assert done.stderr == ""
    front = sorted((tmp_path / "out.sweep/front").glob("*.yaml"))
    again = subprocess.run(
        [sys.executable, "-m", "compress", "run", str(front[0])], cwd=ROOT, capture_output=True, text=True
    )
    assert again.stdout.startswith("nothing to do: "), again.stderr


@pytest.mark.parametrize("options", [(), ("--submit", "local")], ids=["processes", "jobs"])
def test_two_workers_end_with_the_front_of_one(sweep, tmp_path, options):
    if options:
        pytest.importorskip("submitit")
    path = recipe(sweep, tmp_path, {"search": {"choices": ["30%", "50%"]}})
    done = command(path, "--workers", 2, *options, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert [trial["state"] for trial in made["trials"]] == ["done"] * 4
    begun = [event for event in events(tmp_path / "out.sweep") if event["event"] == "begun"]
    assert sorted(event["trial"] for event in begun) == [1, 2, 3, 4]
    assert len({event["by"] for event in begun}) == 2
    assert all(f"trial {number} of 4 (" in done.stderr for number in range(1, 5))
    alone = run_sweep({**json.loads(path.read_text()), "output": str(tmp_path / "alone")}, runner=in_process)
    assert made["front"] == alone["front"]
    assert [t["goals"] for t in made["trials"]] == [t["goals"] for t in alone["trials"]]
