from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest

import compress
from compress import report as reports
from compress.errors import ReportError
from compress.report import figures
from compress.report.detail_rows import shape_rows
from compress.report.layout import table


def test_report_fits_its_schema_and_reads_back(finished, tmp_path):
    data = json.loads(reports.to_json(finished.report))
    jsonschema.validate(data, reports.report_schema(), cls=jsonschema.Draft202012Validator)
    reports.save(finished.report, tmp_path / "report.json")
    assert reports.load(tmp_path / "report.json") == finished.report
    folder = Path(finished.report["run_folder"])
    assert reports.load(folder / "report.json") == finished.report
    assert (folder / "report.md").read_text() == reports.render_markdown(finished.report)


def test_to_json_round_trips_non_finite_numbers(finished, tmp_path):
    broken = json.loads(reports.to_json(finished.report))
    broken["result"]["evaluation"]["bits_per_byte"] = math.nan
    broken["result"]["evaluation"]["documents"][0]["nll"] = math.inf
    text = reports.to_json(broken)
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    jsonschema.validate(json.loads(text), reports.report_schema())
    (tmp_path / "r.json").write_text(text)
    back = reports.load(tmp_path / "r.json")["result"]["evaluation"]
    assert math.isnan(back["bits_per_byte"])
    assert back["documents"][0]["nll"] == math.inf
    assert "nan" in reports.render_markdown(reports.load(tmp_path / "r.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a report"),
        ("{", "is not a report"),
        ("[]", "is not a report of this tool"),
        ('{"schema": "compress.eval/1"}', "is not a report of this tool"),
        ('{"schema": "compress.report/2"}', "of the schema compress.report/2, this version reads compress.report/1"),
        ('{"schema": "compress.report/1"}', "versions: is damaged: Field required"),
    ],
)
def test_load_refuses_other_documents(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ReportError) as caught:
        reports.load(tmp_path / "r.json")
    assert message in str(caught.value)
    assert str(tmp_path / "r.json") in str(caught.value)


def test_waterfall_adds_up(finished):
    steps = figures.waterfall(finished.report)
    assert [s.name for s in steps] == ["original", "prune_structured", "prune_unstructured", "cast"]
    assert [s.settings for s in steps[1:]] == [
        "layers: 1, compensation: none",
        "method: magnitude, pattern: 2:4",
        "weights: bf16",
    ]
    assert steps[0].bytes - sum(s.saved for s in steps) == steps[-1].bytes == finished.report["result"]["size"]["bytes"]
    measured = [s for s in steps if s.cost is not None]
    assert [s.name for s in measured] == ["cast"]  # one measurement per fused stage
    total = finished.report["result"]["evaluation"]["bits_per_byte"] - steps[0].quality
    assert sum(s.cost for s in measured) == pytest.approx(total)
    assert [len(figures.bar(s, 20)) for s in steps[:2]] == [20, 20]


def test_junit_follows_the_schema_of_ci_systems(finished):
    root = ElementTree.fromstring(reports.render_junit(finished.report))
    (suite,) = root
    assert suite.attrib["tests"] == root.attrib["tests"] == "2"
    assert float(suite.attrib["time"]) == pytest.approx(finished.report["seconds"], abs=1e-3)
    assert finished.report["started"].startswith(suite.attrib["timestamp"])
    assert "file" not in suite.attrib  # the recipe was made in Python
    named = reports.render_junit({**finished.report, "recipe": {"path": "r.yaml"}})
    assert [e.attrib["file"] for e in ElementTree.fromstring(named).iter("testcase")] == ["r.yaml"] * 2
    verdicts = {g["gate"]: g["verdict"] for g in finished.report["gates"]}
    assert len(suite.findall("testcase")) == 2
    for case in suite.findall("testcase"):
        kinds = {c.tag for c in case}
        expected = {"pass": "system-out", "fail": "failure", "inconclusive": "error"}[verdicts[case.attrib["name"]]]
        assert kinds == {expected}
    odd = {"gates": [{"gate": "a<b", "verdict": "fail", "text": "x & \x07 y"}], "status": "failed", "output": "out"}
    assert ElementTree.fromstring(reports.render_junit(odd))[0].find("testcase/failure").attrib["message"] == "x &  y"


def test_step_summary_is_written_for_github(finished, tmp_path, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert not reports.append_step_summary(finished.report)
    (tmp_path / "summary.md").write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert reports.append_step_summary(finished.report)
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("before\n# ")
    assert reports.render_markdown(finished.report) in text
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "gone/summary.md"))
    assert not reports.append_step_summary(finished.report)


def test_markdown_tables_have_equal_columns(finished):
    for line, following in zip(lines := reports.render_markdown(finished.report).splitlines(), lines[1:], strict=False):
        if line.startswith("|") and following.startswith("|"):
            assert line.replace("\\|", "").count("|") == following.replace("\\|", "").count("|")


def test_published_card_is_reproducible(finished):
    readme = (finished.checkpoint / "README.md") if finished.published else None
    if readme is not None:
        text = readme.read_text()
        assert finished.report["started"] not in text
        assert "/tmp" not in text


@pytest.mark.slow
def test_report_lists_shapes_tried_for_a_target(tmp_path, pico_llama, texts):
    train, _ = texts
    done = compress.run(
        {
            "model": str(pico_llama),
            "output": str(tmp_path / "out"),
            "document_separator": "<|doc|>",
            "data": {"calibration": {"files": [str(train)], "samples": 8, "length": 32}},
            "passes": [{"prune_structured": {"keep_parameters": "75%", "compensation": "least_squares"}}],
        }
    )
    rows = shape_rows(done.report["stages"][0]["passes"][0]["details"])
    assert len(rows) > 1
    assert [row[-1] for row in rows].count("chosen") == 1
    text = reports.render_markdown(done.report)
    assert "| removed blocks | heads | neurons | parameters | size | prefill | divergence |  |" in text
    assert all(f"| {' | '.join(row)} |" in text for row in rows)
    assert "shapes: " not in text


def test_loss_by_position_is_in_every_rendering(finished, capsys):
    from compress.cli.tables import print_report

    rows = finished.report["result"]["positions"]
    assert [row["from"] for row in rows] == [0, 16]
    for row in rows:
        assert row["lower"] <= row["increase"] <= row["upper"]
    line = figures.position_rows(finished.report["result"])[1]
    text = reports.render_markdown(finished.report)
    assert f"| {' | '.join(line)} |" in text.partition("## Loss by position\n")[2]
    print_report(finished.report)
    printed = capsys.readouterr().out
    assert "loss by position" in printed
    assert "16 to 31" in printed


def test_tables_leave_out_empty_columns():
    assert table(("a", "b", "c"), [("1", "", "3"), ("4", "", "")], right=(1, 2)) == [
        "| a | c |",
        "| --- | --: |",
        "| 1 | 3 |",
        "| 4 |  |",
    ]
    assert table(("a", "b"), []) == ["| a | b |", "| --- | --- |"]


def test_cost_of_a_metric_that_compares_is_from_the_original_itself(finished):
    stage = {
        **finished.report["stages"][-1],
        "evaluation": {**finished.report["stages"][-1]["evaluation"], "bits_per_byte": None},
    }
    original = {**finished.report["original"]["evaluation"], "bits_per_byte": None, "perplexity": None}
    report = {**finished.report, "original": {**finished.report["original"], "evaluation": original}, "stages": [stage]}
    first, *_, last = figures.waterfall(report)
    assert figures.headline(report).compares
    assert (first.quality, last.cost) == (0.0, last.quality)


def test_run_begins_and_ends_with_its_verdict(finished, capsys):
    from compress.cli.tables import print_report

    print_report(finished.report)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == figures.verdict_text(finished.report)
    assert "bits per byte" in lines[1]
    assert lines[-1] == f"gates: {finished.report['status']}"
