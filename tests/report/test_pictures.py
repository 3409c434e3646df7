"""Pictures of a run: lines of a training, the main picture, strips of gates, bars by block."""

from __future__ import annotations

import copy
import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from compress import report as reports
from compress.report import figures
from compress.report.details import sections
from compress.report.pictures.blocks import block_bars
from compress.report.pictures.gates import gate_strip
from compress.report.pictures.lines import draw, losses_chart
from compress.report.pictures.svg import inline, log_marks, mark_text, standalone, ticks, width_of

SPACE = "{http://www.w3.org/2000/svg}"
TRAINING = {
    "steps": 40, "samples": 100, "epochs": 6.4, "tokens": 10240, "tokens_per_second": 812.3, "best_step": 20, "stopped": None,
    "held_out": [{"step": 0, "loss": 2.0}, {"step": 20, "loss": 1.25}, {"step": 40, "loss": 1.5}],
    "losses": [{"step": 10, "loss": 1.9, "kl": 1.8}, {"step": 20, "loss": 1.3, "kl": 1.2}],
}  # fmt: skip
GATE = {"gate": "kl.max", "verdict": "pass", "value": 0.2, "bound": 0.5, "lower": 0.1, "upper": 0.3, "unit": "nats", "text": "0.2 ≤ 0.5"}  # fmt: skip


def points(root):
    lines = root.iter(f"{SPACE}polyline")
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in lines]


def test_losses_are_drawn_inside_the_frame():
    root = ElementTree.fromstring(standalone(draw(losses_chart(TRAINING, "distill <1>"))))
    lines = points(root)
    assert [len(line) for line in lines] == [2, 3]
    assert all(72 <= x <= 464 and 64 <= y <= 246 for line in lines for x, y in line)
    assert lines[1][1][1] > lines[1][2][1] > lines[1][0][1]  # lower losses are further down
    assert "distill <1>" in [e.text for e in root.iter(f"{SPACE}text")]


def test_losses_that_are_not_finite_are_left_out():
    held = [*TRAINING["held_out"], {"step": 60, "loss": math.nan}]
    assert (
        len(points(ElementTree.fromstring(standalone(draw(losses_chart({**TRAINING, "held_out": held}, "t")))))[1]) == 3
    )
    assert not losses_chart({"losses": [], "held_out": [{"step": 0, "loss": math.inf}]}, "t").drawable


def test_ticks_are_round_and_cover_the_range():
    assert ticks(0.19, 0.34) == [0.15, 0.2, 0.25, 0.3, 0.35]
    assert ticks(0, 40) == [0, 10, 20, 30, 40]
    assert len(ticks(3.0, 3.0)) >= 1
    assert [mark_text([10.385, 10.39, 10.395])(mark) for mark in (10.39, 10.395)] == ["10.390", "10.395"]
    assert mark_text([0, 20, 40])(1000) == "1,000"
    assert log_marks(0.03, 1.5) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])


def test_best_held_out_loss_is_named():
    (section,) = sections({"name": "distill", "details": {"training": {**TRAINING, "stopped": "no progress"}}}, "l.svg")
    assert section.text.startswith(
        "`distill`, training: 10,240 tokens in 40 steps, 6.4 times through the data, 812 tokens per second."
    )
    assert "Held-out loss 2.0000 ▶ 1.2500, best at step 20. Stopped early: no progress." in section.text
    assert section.picture == "l.svg"
    assert section.rows[1] == ["20", "1.2500", "1.2000"]


def test_depth_is_a_table_with_the_losses_of_each_round():
    details = {
        "loss_without_block": [{"0": 5.2, "1": 0.25}, {"0": 6.0}], "samples_without_block": [{"0": 4, "1": 8}, {"0": 4}],
        "removed_blocks": [1],
    }  # fmt: skip
    (section,) = sections({"name": "prune_structured", "details": {**details, "removed_blocks": [1]}}, "")[1:]
    assert section.rows == [("0", "5.2000 (4)", "6.0000 (4)", ""), ("1", "0.2500 (8)", "", "removed")]


def test_a_gap_is_a_row_with_its_matrix_and_errors():
    gap = {"matrix": "model.layers.15.mlp.down_proj.weight", "before": 0.41, "after": 0.2049}
    details = {"removed_blocks": [16], "blocks": [{"block": 3, "seconds": 1.0}, {"block": 15, "gap": gap}]}
    (section,) = sections({"name": "prune_structured", "details": details}, "")[1:]
    assert "in front of removed blocks" in section.text
    assert section.rows == [("15", "mlp.down_proj", "0.4100 ▶ 0.2049")]


def test_main_picture_has_a_point_per_measured_step_and_a_bar_per_step(finished):
    root = ElementTree.fromstring(reports.render_main_picture(finished.report))
    assert [len(line) for line in points(root)] == [2]  # one measurement of a fused stage
    bars = [float(e.get("width")) for e in root.iter(f"{SPACE}rect") if e.get("class") == "first"]
    steps = figures.waterfall(finished.report)
    assert bars == pytest.approx([456 * step.share for step in steps], abs=0.1)
    texts = [e.text for e in root.iter(f"{SPACE}text")]
    assert {step.name for step in steps} <= set(texts)


@pytest.mark.parametrize("size", [8_140_000, 9.9e6, 1.15e9, 101, 5.2e12])
def test_texts_below_the_axis_of_sizes_are_apart(finished, size):
    report = copy.deepcopy(finished.report)
    report["original"]["size"]["bytes"] = size
    root = ElementTree.fromstring(reports.render_main_picture(report))
    below = [(float(e.get("x")), e.text) for e in root.iter(f"{SPACE}text") if e.get("y") == "258.0"]
    assert len(below) >= 3
    for (x, text), (after, other) in itertools.pairwise(below):
        assert after - x >= (width_of(text) + width_of(other)) / 2 + 5


def test_run_without_evaluation_has_the_waterfall_alone(finished):
    stages = [{**stage, "evaluation": None} for stage in finished.report["stages"]]
    report = {**finished.report, "stages": stages, "original": {**finished.report["original"], "evaluation": None}}
    assert points(ElementTree.fromstring(reports.render_main_picture(report))) == []


def test_gate_strip_places_whiskers_value_and_bound_in_order():
    root = ElementTree.fromstring(inline(gate_strip(GATE)))
    value = float(root.find("circle").get("cx"))
    whiskers = next(e.get("d") for e in root.iter("path") if e.get("class") == "pass-line")
    lower, upper = (float(x) for x in re.match(r"M([\d.]+) 17H([\d.]+)", whiskers).groups())
    start = float(root.find("rect").get("x"))
    assert lower < value < upper < start
    least = ElementTree.fromstring(inline(gate_strip({**GATE, "gate": "agreement.min"})))
    assert float(least.find("rect").get("x")) == 12, "what is below the bound fails"


@pytest.mark.parametrize("change", [{"value": None}, {"value": math.nan}, {"upper": math.inf}])
def test_gate_without_a_finite_value_has_no_strip(change):
    assert gate_strip({**GATE, **change}) is None


def test_block_bars_mark_removed_blocks():
    picture = block_bars("t", [("0", 2.0), ("1", 1.0), ("2", math.nan)], {"1"}, str)
    bars = list(ElementTree.fromstring(inline(picture)).iter("rect"))
    assert [bar.get("class") for bar in bars] == ["first", "second"]
    assert float(bars[0].get("height")) == pytest.approx(2 * float(bars[1].get("height")), abs=0.1)
    assert block_bars("t", [("0", math.nan)], set(), str) is None
