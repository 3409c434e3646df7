"""The main picture: size against quality, and the waterfall of passes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from compress.formatting import format_bytes
from compress.report import figures
from compress.report.figures import Step
from compress.report.pictures.svg import (
    WIDTH,
    Picture,
    Scale,
    cut,
    heading,
    mark_text,
    stacked,
    text,
    ticks,
    width_of,
    y_axis,
)

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 290, 72, 40, 56, 52
_ROW, _MARGIN = 62, 12
#: Between two texts of an axis.
_BETWEEN = 10


def main_picture(report: Mapping[str, Any]) -> Picture:
    """Size against quality, where quality was measured, above the waterfall of passes."""
    parts = filter(None, (size_and_quality(report), waterfall(report)))
    return stacked("size against quality, and bytes saved by each pass", parts)


def size_and_quality(report: Mapping[str, Any]) -> Picture | None:
    """A numbered point for the original and for each measured pass: bytes, and the headline metric. None for fewer than two."""
    metric = figures.headline(report)
    points = [
        (number, step.bytes, step.quality)
        for number, step in enumerate(figures.waterfall(report))
        if step.quality is not None and math.isfinite(step.quality)
    ]
    if len(points) < 2:
        return None
    marks = ticks(*(edge(value for _, _, value in points) for edge in (min, max)))
    margin = 0.5 * (marks[1] - marks[0])
    y = Scale(marks[0] - margin, marks[-1] + margin, _HEIGHT - _BOTTOM, _TOP)
    sizes = ticks(0, max(size for _, size, _ in points))
    x = Scale(0, sizes[-1], _LEFT, WIDTH - _RIGHT)
    better = "lower" if metric.lower else "higher"
    parts = [heading("size against quality"), text(_MARGIN, 42, f"{metric.title} ({better} is better)")]
    parts += y_axis(y, marks, mark_text(marks), WIDTH - _RIGHT, _LEFT)
    widest = max(width_of(format_bytes(mark)) for mark in sizes)
    every = math.ceil((widest + _BETWEEN) / (x(sizes[1]) - x(sizes[0])))
    for mark in sizes[::every]:
        parts.append(text(x(mark), _HEIGHT - _BOTTOM + 20, format_bytes(mark), anchor="middle"))
    parts.append(text(WIDTH - _RIGHT, _HEIGHT - 12, "bytes of all weight files", anchor="end"))
    places = [(number, x(size), y(value)) for number, size, value in points]
    path = " ".join(f"{a:.1f},{b:.1f}" for _, a, b in places)
    parts.append(f'<polyline class="dim-line" points="{path}" stroke-width="1.5" stroke-dasharray="4 4"/>')
    parts += [part for number, a, b in places for part in _numbered(number, a, b)]
    return Picture(f"{metric.title} against size", _HEIGHT, tuple(parts))


def _numbered(number: int, x: float, y: float) -> list[str]:
    """The mark of a step: 0 is the original."""
    kind = "second" if number else "first"
    return [
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="10"/>',
        text(x, y + 4.5, str(number), anchor="middle", size=12, kind="ground"),
    ]


def waterfall(report: Mapping[str, Any]) -> Picture:
    """A bar for each step: bytes that are left, and paler those that it saved."""
    steps = figures.waterfall(report)
    widest = max((step.bytes + max(step.saved, 0) for step in steps), default=0) or 1
    parts = [heading("bytes left, and saved by each pass")]
    for number, step in enumerate(steps):
        parts += _bar(report, step, number, 38 + _ROW * number, (WIDTH - 2 * _MARGIN) / widest)
    return Picture("bytes left and saved by each pass", 38 + _ROW * len(steps), tuple(parts))


def _bar(report: Mapping[str, Any], step: Step, number: int, top: float, unit: float) -> list[str]:
    """Number, name and figures of a step, below them its bar, and its settings."""
    _, cost = figures.headline_cells(figures.headline(report), step)
    values = " · ".join(filter(None, [figures.signed_bytes(step.saved), cost, format_bytes(step.bytes)]))
    name = cut(step.name, WIDTH - 3 * _MARGIN - 24 - width_of(values), 13)
    left, saved = unit * step.bytes, unit * max(step.saved, 0)
    return [
        *_numbered(number, _MARGIN + 10, top + 12),
        text(_MARGIN + 28, top + 16, name, kind="ink"),
        text(WIDTH - _MARGIN, top + 16, values, anchor="end", kind="ink"),
        f'<rect class="first" x="{_MARGIN}" y="{top + 26:g}" width="{left:.1f}" height="10"/>',
        f'<rect class="saved" x="{_MARGIN + left:.1f}" y="{top + 26:g}" width="{saved:.1f}" height="10"/>',
        text(_MARGIN, top + 50, cut(step.settings, WIDTH - 2 * _MARGIN, 12), size=12),
    ]
