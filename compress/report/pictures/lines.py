"""Lines by step or by length: losses of a training, and cost against the length of the prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from compress.formatting import format_bytes, seconds_text
from compress.report.lengths import cache_bytes_at
from compress.report.pictures.svg import (
    WIDTH,
    Picture,
    Scale,
    heading,
    log_marks,
    mark_text,
    text,
    ticks,
    width_of,
    y_axis,
)

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 290, 72, 16, 64, 44
#: Unit of a quantity ▶ its text at an axis.
_TEXTS: Mapping[str, Callable[[float], str]] = {"seconds": seconds_text, "bytes": format_bytes}


@dataclass(frozen=True, slots=True)
class Chart:
    """Two lines over one axis, as numbers: the picture and the chart of a page are made of them.

    Attributes:
        lines: name and points (x, y) of each. of: name of the x axis. unit: of y. log: both axes are logarithmic.
    """

    title: str
    lines: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]
    of: str
    unit: Literal["nats", "seconds", "bytes"]
    log: bool = False

    @property
    def drawable(self) -> bool:
        """Whether there is a point to draw."""
        return any(points for _, points in self.lines)


def losses_chart(training: Mapping[str, Any], title: str) -> Chart:
    """Mean training loss since the last evaluation, and held-out loss, by step."""
    rows = (("training", training["losses"]), ("held out", training["held_out"]))
    return _chart(title, [(name, [(row["step"], row["loss"]) for row in of]) for name, of in rows], "step", "nats")


def length_charts(original: Mapping[str, Any], result: Mapping[str, Any]) -> list[Chart]:
    """Prefill seconds, and bytes of the cache where they are known, by length of the prompt; empty without lengths."""
    sides = (original, result)
    rows = [(side["latency"] or {}).get("lengths") or [] for side in sides]
    prefill = [[(row["length"], row["prefill"]["median"]) for row in of_side] for of_side in rows]
    cache = [cache_bytes_at(x, y, *sides) for x, y in zip(*rows, strict=False)]
    known = [(row["length"], pair) for row, pair in zip(rows[0], cache, strict=False) if pair is not None]
    caches = [[(length, float(pair[side])) for length, pair in known] for side in (0, 1)]
    names = ("before", "after")
    charts = [
        _chart("prefill of a prompt", list(zip(names, prefill, strict=True)), "tokens", "seconds", log=True),
        _chart("cache after it", list(zip(names, caches, strict=True)), "tokens", "bytes", log=True),
    ]
    return [chart for chart in charts if chart.drawable]


def _chart(
    title: str,
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    of: str,
    unit: Literal["nats", "seconds", "bytes"],
    *,
    log: bool = False,
) -> Chart:
    """A chart without what cannot be drawn: NaN, infinities and, on logarithmic axes, zeros."""
    clean = tuple((n, tuple(p for p in points if _drawable(p, log))) for n, points in lines)
    return Chart(title, clean, of, unit, log)


def _drawable(point: tuple[float, float], log: bool) -> bool:
    return all(math.isfinite(value) and (not log or value > 0) for value in point)


def draw(chart: Chart) -> Picture:
    """The chart as a picture."""
    points = [point for _, line in chart.lines for point in line]
    x, places = _x_scale(chart, sorted({n for n, _ in points}))
    low, high = (edge(value for _, value in points) for edge in (min, max))
    marks = log_marks(low, high) if chart.log else ticks(low, high)
    low, high = min(low, marks[0]), max(high, marks[-1])
    if low == high:
        high = low * 2 if chart.log else low + 1
    y = Scale(low, high, _HEIGHT - _BOTTOM, _TOP, 10 if chart.log else None)
    parts = [heading(chart.title), *y_axis(y, marks, _TEXTS.get(chart.unit) or mark_text(marks), WIDTH - _RIGHT, _LEFT)]
    parts += [text(x(place), _HEIGHT - _BOTTOM + 18, f"{place:,.0f}", anchor="middle") for place in places]
    parts.append(text(WIDTH - _RIGHT, _HEIGHT - 8, chart.of, anchor="end"))
    place = float(_LEFT)
    for (name, line), kind in zip(chart.lines, ("first", "second"), strict=True):
        parts.append(f'<path class="{kind}-line" d="M{place:g} 44h18" stroke-width="2"/>')
        parts.append(text(place + 24, 48, name))
        place += 48 + width_of(name)
        drawn = [f"{x(a):.1f},{y(b):.1f}" for a, b in line]
        parts.append(f'<polyline class="{kind}-line" points="{" ".join(drawn)}" stroke-width="2"/>')
        if len(drawn) <= 60:
            circles = (point.split(",") for point in drawn)
            parts += [f'<circle class="{kind}" cx="{a}" cy="{b}" r="3"/>' for a, b in circles]
    return Picture(
        f"{chart.title}: {' and '.join(name for name, _ in chart.lines)} by {chart.of}", _HEIGHT, tuple(parts)
    )


def _x_scale(chart: Chart, values: Sequence[float]) -> tuple[Scale, list[float]]:
    """Scale of the x axis, and the places that are named there."""
    first, last = values[0], values[-1]
    if chart.log:
        return Scale(first, last if last > first else 2 * first, _LEFT, WIDTH - _RIGHT, 2), list(values)
    last = last or 1
    places = [mark for mark in ticks(0, last) if mark <= last and mark == round(mark)]
    return Scale(0, last, _LEFT, WIDTH - _RIGHT), places
