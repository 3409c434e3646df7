from __future__ import annotations

import json

import pytest

import compress
from compress.evaluation import worker
from tests import pico


@pytest.mark.slow  # four interpreters
def test_run_reports_cost_by_length_and_gates_judge_it(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "SECONDS", 0.1)
    model = pico.save(tmp_path / "in", "mistral", sliding_window=None)
    recipe = {
        "model": str(model),
        "output": str(tmp_path / "out"),
        "threads": 1,
        "max_ram": "20GB",
        "passes": [{"local_attention": {"window": 8, "full": 0, "choose": "every", "sinks": 0}}],
        "evaluate": [{"latency": {"lengths": [16, 32, 64], "generated": 2}}],
        "gates": {
            "cache": [{"at": 64, "max_ratio": 0.2}, {"at": 64, "max": 4 * 4 * 32 * 7}],
            "prefill": {"at": 64, "max_ratio": 100},
            "memory": {"at": 64, "max_ratio": 1e6},
        },
    }
    report = compress.run(recipe).report
    assert {row["gate"]: row["verdict"] for row in report["gates"]} == {
        "cache.max_ratio at 64": "pass",
        "cache.max at 64": "pass",
        "prefill.max_ratio at 64": "pass",
        "memory.max_ratio at 64": "pass",
    }
    row = report["result"]["latency"]["lengths"][-1]
    assert row["cache"]["planned"] == row["cache"]["values"] == 4 * 32 * 7
    assert [path["path"] for path in row["paths"]][:1] == ["compress_local"]
    text = (tmp_path / "out.run/report.md").read_text()
    assert "## Cost by length of the prompt" in text
    assert "![prefill and cache against length](lengths.svg)" in text
    assert (tmp_path / "out.run/lengths.svg").read_text().startswith("<svg")
    loaded = json.loads((tmp_path / "out.run/report.json").read_text())
    assert loaded["recipe"]["resolved"]["gates"]["prefill"] == {"at": 64, "max_ratio": 100.0}
    again = compress.run(recipe)
    assert again.nothing_to_do


def test_gate_on_cache_needs_no_measurement(tmp_path):
    model = pico.save(tmp_path / "in", "mistral", sliding_window=None)
    recipe = {
        "model": str(model),
        "output": str(tmp_path / "out"),
        "passes": [{"local_attention": {"window": 8, "full": 0, "choose": "every", "sinks": 0}}],
        "gates": {"cache": {"at": 64, "max_ratio": 0.1}},
    }
    report = compress.run(recipe).report
    (row,) = report["gates"]
    assert (row["gate"], row["verdict"], row["value"]) == ("cache.max_ratio at 64", "fail", 7 / 64)
    assert report["result"]["latency"] is None
    plan = compress.plan(recipe)
    assert plan.cache == [{"length": 64, "original": 4 * 4 * 32 * 64, "result": 4 * 4 * 32 * 7}]
