"""Losses of a training as an SVG picture, which is written beside the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from compress.report.figures import losses_file

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 44
_INK, _GRID = "#57606a", "#d0d7de"
#: Colours of training loss and held-out loss; they differ in brightness too.
_COLOURS = ("#54aeff", "#bc4c00")


def render_pictures(report: Mapping[str, Any]) -> dict[str, str]:
    """SVG picture of every training of a run, by file name."""
    passes = [row for stage in report["stages"] for row in stage["passes"]]
    return {
        losses_file(report, row): render_losses(row["details"]["training"], f"{row['name']}: loss by step")
        for row in passes
        if "training" in row["details"]
    }


def render_losses(training: Mapping[str, Any], title: str) -> str:
    """SVG with two lines by step: mean training loss since the last evaluation, and held-out loss."""
    series = {
        "training": [(row["step"], row["loss"]) for row in training["losses"]],
        "held out": [(row["step"], row["loss"]) for row in training["held_out"]],
    }
    points: list[tuple[int, float]] = [point for line in series.values() for point in line]
    last = max(step for step, _ in points) or 1
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    marks = _ticks(low, high)
    low, high = min(low, marks[0]), max(high, marks[-1])
    if high == low:
        high = low + 1

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last

    def y(loss: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - loss) / (high - low)

    parts = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>', _text(_LEFT, 22, title, "start", 14)]
    for mark in marks:
        parts.append(f'<path d="M{_LEFT} {y(mark):.1f}H{_WIDTH - _RIGHT}" stroke="{_GRID}"/>')
        parts.append(_text(_LEFT - 8, y(mark) + 4, f"{mark:.4g}", "end"))
    for mark in _ticks(0, last):
        if mark <= last and mark == round(mark):
            parts.append(_text(x(mark), _HEIGHT - _BOTTOM + 18, f"{mark:g}", "middle"))
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 8, "steps", "end"))
    for (name, line), colour, place in zip(series.items(), _COLOURS, (190, 90), strict=True):
        where = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in line)
        parts.append(f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<path d="M{_WIDTH - place - 26} 18h18" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(_WIDTH - place, 22, name, "start"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, *parts, "</svg>", ""])


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from just below the lowest to just above the highest."""
    span = high - low if high > low else abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first, final = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, final + 1)]


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{_INK}" text-anchor="{anchor}">{escape(text)}</text>'
    )
