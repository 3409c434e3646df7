"""The GPU script runs on a CPU with a small shape, so that it cannot rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_part_prints_a_line_on_a_cpu():
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--part", "gptq", "distill", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    model, cast, trained, tests = (json.loads(line) for line in done.stdout.splitlines())
    assert model["part"] == "model"
    assert cast["shape"] == "small"
    assert len(cast["block_seconds"]) == gpu.BLOCKS
    assert trained["tokens_per_second"] > 0
    assert tests["skipped"]


def test_a_part_that_fails_says_where_in_its_line(capsys):
    text = (
        f'Traceback\n  File "{ROOT}/compress/x.py", line 3, in f\n  File "/lib/y.py", line 1\nRuntimeError: no memory\n'
    )
    assert gpu.last_error(text) == f'RuntimeError: no memory; File "{ROOT}/compress/x.py", line 3, in f'
    assert gpu._failed("gptq", "took more than 9 seconds", b'{"done": "cast, block 0", "seconds": 2.5}\n{"do') == 1
    assert json.loads(capsys.readouterr().out) == {
        "part": "gptq", "failed": "took more than 9 seconds", "done": [{"done": "cast, block 0", "seconds": 2.5}]
    }  # fmt: skip


def test_goals_are_judged_by_the_figures_at_hand():
    assert gpu.reached("gptq", {"seconds_8b": 299.0, "peak_gb": 7}) == {"seconds_8b": True, "peak_gb": False}
    assert gpu.reached("distill", {"mfu": 0.41}) == {"mfu": True}
    assert gpu.reached("distill", {}) == {}
