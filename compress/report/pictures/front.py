"""The trials of a sweep by two goals, and their front as steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from compress.report.pictures.svg import WIDTH, Picture, Scale, heading, text, ticks, width_of, y_axis

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 84, 28, 56, 52
#: Between two texts of an axis.
_BETWEEN = 10


@dataclass(frozen=True, slots=True)
class TrialPoint:
    """A trial: its number, its two values, the ends of the interval of each, and what became of it."""

    number: int
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    kind: Literal["front", "beaten", "failed"]


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: the name of its goal, whether lower is better, and values as text."""

    name: str
    lower: bool
    show: Callable[[float], str]


def front_picture(points: Sequence[TrialPoint], x: Axis, y: Axis) -> Picture | None:
    """The picture; None for fewer than two trials with finite values."""
    points = [p for p in points if all(map(math.isfinite, (*p.x, *p.y)))]
    if len(points) < 2:
        return None
    places = (_scale([v for p in points for v in p.x], _LEFT, WIDTH - _RIGHT),
              _scale([v for p in points for v in p.y], _HEIGHT - _BOTTOM, _TOP))  # fmt: skip
    across, up = places
    better = " and ".join(f"{axis.name} ({'lower' if axis.lower else 'higher'} is better)" for axis in (y, x))
    parts = [heading(f"{y.name} against {x.name}"), text(12, 42, better)]
    parts += y_axis(up, ticks(up.low, up.high)[1:-1], y.show, WIDTH - _RIGHT, _LEFT)
    marks = ticks(across.low, across.high)[1:-1]
    widest = max((width_of(x.show(mark)) for mark in marks), default=0)
    step = across(marks[1]) - across(marks[0]) if len(marks) > 1 else WIDTH
    for mark in marks[:: max(1, math.ceil((widest + _BETWEEN) / step))]:
        parts.append(text(across(mark), _HEIGHT - _BOTTOM + 20, x.show(mark), anchor="middle"))
    parts.append(text(WIDTH - _RIGHT, _HEIGHT - 12, x.name, anchor="end"))
    parts += _steps([p for p in points if p.kind == "front"], x.lower, across, up)
    for kind in ("beaten", "failed", "front"):
        parts += [part for p in points if p.kind == kind for part in _mark(p, across, up)]
    return Picture(f"{y.name} against {x.name} of {len(points)} trials", _HEIGHT, tuple(parts))


def _scale(values: Sequence[float], start: float, end: float) -> Scale:
    marks = ticks(min(values), max(values))
    margin = 0.5 * (marks[1] - marks[0] if len(marks) > 1 else abs(marks[0]) or 1.0)
    return Scale(marks[0] - margin, marks[-1] + margin, start, end)


def _steps(front: Sequence[TrialPoint], lower: bool, across: Scale, up: Scale) -> list[str]:
    """The best value at each place: a line of steps from the best trial on."""
    ordered = sorted(front, key=lambda p: p.x[0], reverse=not lower)
    if not ordered:
        return []
    path = f"M{across(ordered[0].x[0]):.1f} {up(ordered[0].y[0]):.1f}"
    path += "".join(f"H{across(p.x[0]):.1f}V{up(p.y[0]):.1f}" for p in ordered[1:])
    edge = WIDTH - _RIGHT if lower else _LEFT
    return [f'<path class="second-line" d="{path}H{edge:g}" stroke-width="1.5" stroke-dasharray="4 4"/>']


def _mark(point: TrialPoint, across: Scale, up: Scale) -> list[str]:
    """Whiskers and the mark of a trial."""
    x, y = across(point.x[0]), up(point.y[0])
    kind = {"front": "second", "beaten": "dim", "failed": "fail"}[point.kind]
    path = "".join(
        f"M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}"
        for a, b, c, d in (
            (across(point.x[1]), y, across(point.x[2]), y),
            (x, up(point.y[1]), x, up(point.y[2])),
        )
        if (a, b) != (c, d)
    )
    whiskers = [f'<path class="{kind}-line" d="{path}" stroke-width="1.5"/>'] if path else []
    if point.kind != "front":
        shape = f'class="{kind}-line" stroke-width="1.5"' if point.kind == "failed" else f'class="{kind}"'
        return [*whiskers, f'<circle {shape} cx="{x:.1f}" cy="{y:.1f}" r="4"/>']
    return [
        *whiskers,
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="10"/>',
        text(x, y + 4.5, str(point.number), anchor="middle", size=12, kind="ground"),
    ]
