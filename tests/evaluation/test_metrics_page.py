"""docs/metrics.md names every metric, gate, bound and key of reports that the code knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from compress import gates, statistics
from compress.evaluation import metrics
from compress.recipe.gates import METRICS, Gates, metric_of
from compress.recipe.messages import models_in
from compress.report import latency_schema, repetition_schema, schema

PAGE = (Path(__file__).resolve().parents[2] / "docs/metrics.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", PAGE))))
PARTS = [
    schema.SizeRow,
    schema.Emulated,
    schema.Evaluation,
    schema.DocumentScore,
    schema.PositionSums,
    schema.PositionRow,
    schema.PairedPosition,
    repetition_schema.Repetitions,
    repetition_schema.RepetitionRow,
    repetition_schema.RepetitionSample,
    schema.Classification,
    schema.PredictionRow,
    schema.Masked,
    schema.MaskedScore,
    schema.Embeddings,
    schema.EmbeddedRow,
    schema.Timing,
    schema.Memory,
    schema.Latency,
    schema.CacheParts,
    latency_schema.CostRow,
    latency_schema.ClockedTiming,
    latency_schema.PromptMemory,
    latency_schema.CacheRow,
    latency_schema.PathRow,
    latency_schema.Fit,
    latency_schema.PathFit,
    latency_schema.NotTried,
    schema.TaskRow,
    schema.Tasks,
    schema.GateRow,
]


def rows():
    """The overview: metric ▶ gate ▶ bounds."""
    found = {}
    for line in PAGE.split("## Metrics on text")[0].splitlines():
        if line.startswith("| ["):
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            metric = re.search(r"\w+", cells[0])[0]
            found[metric] = {
                name: re.findall(r"`(\w+)`", bounds) for name, bounds in re.findall(r"`(\w+)`: ([^;]+)", cells[-1])
            }
    return found


def test_overview_has_every_metric_gate_and_bound():
    table = rows()
    assert table.keys() == {*METRICS, "size", "parameters", "cache"}
    listed = {name: bounds for gates_ in table.values() for name, bounds in gates_.items()}
    assert listed.keys() == Gates.model_fields.keys()
    for name, bounds in listed.items():
        (gate,) = models_in(Gates.model_fields[name].annotation)
        assert bounds == list(gate.model_fields), name
        metric = metric_of(name) or name
        assert name in table[metric], name


@pytest.mark.parametrize("metric", METRICS)
def test_metric_has_a_section(metric):
    section = PAGE.partition(f"\n### `{metric}`\n")[2].partition("\n###")[0]
    assert "**Report**" in section
    assert len(section.split()) > 40


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_page_names_every_key_of_reports(part):
    keys = {field.alias or name for name, field in part.model_fields.items()}
    assert keys - NAMED == set()


def test_page_names_intervals_units_and_verdicts():
    assert set(metrics.table()) <= NAMED
    units = re.search(r"unit: of the value: ([^.]+)\.", gates.GateResult.__doc__)[1]
    assert set(re.findall(r"\w+", units)) <= NAMED
    assert f"fewer than {statistics.FEWEST_UNITS} units" in PAGE
    for verdict in get_args(gates.Verdict):
        assert re.search(rf"^\| {verdict} \|", PAGE, re.MULTILINE)
