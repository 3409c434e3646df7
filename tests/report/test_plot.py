"""The picture of a training's losses, and what the report says of it."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from compress.report.details import _training
from compress.report.plot import _ticks, render_losses

TRAINING = {
    "steps": 40, "samples": 100, "epochs": 6.4, "tokens": 10240, "tokens_per_second": 812.3, "best_step": 20, "stopped": None,
    "held_out": [{"step": 0, "loss": 2.0}, {"step": 20, "loss": 1.25}, {"step": 40, "loss": 1.5}],
    "losses": [{"step": 10, "loss": 1.9, "kl": 1.8}, {"step": 20, "loss": 1.3, "kl": 1.2}],
}  # fmt: skip


def test_render_losses_draws_each_loss_inside_frame():
    root = ET.fromstring(render_losses(TRAINING, "distill <1>"))
    space = "{http://www.w3.org/2000/svg}"
    lines = [[tuple(map(float, p.split(","))) for p in e.get("points").split()] for e in root.iter(f"{space}polyline")]
    assert [len(line) for line in lines] == [2, 3]
    assert all(64 <= x <= 624 and 40 <= y <= 276 for line in lines for x, y in line)
    assert lines[1][1][1] > lines[1][2][1] > lines[1][0][1]  # lower losses are further down
    assert "distill <1>" in [e.text for e in root.iter(f"{space}text")]


def test_ticks_are_round_and_cover_the_range():
    assert _ticks(0.19, 0.34) == [0.15, 0.2, 0.25, 0.3, 0.35]
    assert _ticks(0, 40) == [0, 10, 20, 30, 40]
    assert len(_ticks(3.0, 3.0)) >= 1


def test_best_held_out_loss_is_named():
    lines = _training({**TRAINING, "stopped": "no progress"}, "distill", "losses-2.svg")
    assert lines[0].startswith(
        "`distill`, training: 10,240 tokens in 40 steps, 6.4 times through the data, 812 tokens per second."
    )
    assert "Held-out loss 2.0000 ▶ 1.2500, best at step 20. Stopped early: no progress." in lines[0]
    assert "![losses by step](losses-2.svg)" in lines
    assert "| 20 | 1.2500 | 1.2000 |" in lines
