"""Runs beside each other."""

from __future__ import annotations

import copy
import json

import pytest

from compress.cli.commands.checkpoints import are_runs
from compress.errors import ReportError
from compress.report.comparison import compare_runs


def test_runs_are_compared_by_figures_and_settings(finished, tmp_path):
    report = finished.report
    other = copy.deepcopy(report)
    other["result"]["size"]["bytes"] //= 2
    last = other["stages"][-1]["passes"][-1]
    last["settings"] = {**last["settings"], "only": ["*.mlp.*"]}
    paths = []
    for name, data in (("a", report), ("b", other), ("c", report)):
        (tmp_path / f"{name}.run").mkdir()
        (tmp_path / f"{name}.run/report.json").write_text(json.dumps(data, default=str))
        paths.append(tmp_path / f"{name}.run")
    data = compare_runs([paths[0], paths[1] / "report.json", tmp_path / "c"])
    size = next(row for row in data["rows"] if row["name"] == "size")
    assert size["values"][0] == size["values"][2] != size["values"][1]
    assert size["original"]
    assert [row["name"] for row in data["passes"]] == [last["name"]]
    assert "only: [*.mlp.*]" in data["passes"][0]["settings"][1]
    assert are_runs([str(paths[0]), str(paths[1])])
    assert not are_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(ReportError, match="holds no report of a run"):
        compare_runs([tmp_path])
