"""SVG pictures beside the report: losses of a training, and cost against length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from compress.report.figures import losses_file
from compress.report.lengths import cache_bytes_at, length_rows, seconds_text
from compress.settings import format_bytes

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 44
#: Name of the picture of cost by length, beside the report.
LENGTHS_FILE = "lengths.svg"
_INK, _GRID = "#57606a", "#d0d7de"
#: Colours of training loss and held-out loss; they differ in brightness too.
_COLOURS = ("#54aeff", "#bc4c00")


def render_pictures(report: Mapping[str, Any]) -> dict[str, str]:
    """SVG pictures of a run by file name: of every training, and of cost by length where lengths were measured."""
    passes = [row for stage in report["stages"] for row in stage["passes"]]
    lengths = {LENGTHS_FILE: render_lengths(report)} if length_rows(report["original"], report["result"]) else {}
    return lengths | {
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


def render_lengths(report: Mapping[str, Any]) -> str:
    """SVG with two log-log panels by length of the prompt: prefill seconds and bytes of the cache, before and after."""
    sides = (report["original"], report["result"])
    rows = [side["latency"]["lengths"] for side in sides]
    prefill = [[(row["length"], row["prefill"]["median"]) for row in of_side] for of_side in rows]
    cache = [cache_bytes_at(x, y, *sides) for x, y in zip(*rows, strict=False)]
    parts = [f'<rect width="{2 * _WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>']
    parts += _log_panel(0, "prefill of a prompt", prefill, seconds_text)
    known = [(row["length"], pair) for row, pair in zip(rows[0], cache, strict=False) if pair is not None]
    if known:
        lines = [[(length, float(pair[side])) for length, pair in known] for side in (0, 1)]
        parts += _log_panel(_WIDTH, "cache after it", lines, format_bytes)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * _WIDTH}" height="{_HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, *parts, "</svg>", ""])


def _log_panel(
    left: float, title: str, series: Sequence[Sequence[tuple[int, float]]], text: Callable[[float], str]
) -> list[str]:
    """One panel with an axis of lengths and one of powers of ten; ``series``: the original's points, the result's."""
    points = [point for line in series for point in line if point[1] > 0]
    lengths = sorted({n for n, _ in points})
    first, last = math.log2(lengths[0]), math.log2(lengths[-1]) if len(lengths) > 1 else math.log2(lengths[0]) + 1
    low, high = (math.log10(edge(value for _, value in points)) for edge in (min, max))
    marks = _log_marks(low, high)
    low, high = min(low, math.log10(marks[0])), max(high, math.log10(marks[-1]))

    def x(length: float) -> float:
        return left + 84 + (_WIDTH - 84 - 2 * _RIGHT) * (math.log2(length) - first) / (last - first)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - math.log10(value)) / ((high - low) or 1)

    parts = [_text(left + 84, 22, title, "start", 14)]
    for mark in marks:
        parts.append(f'<path d="M{left + 84} {y(mark):.1f}H{left + _WIDTH - 2 * _RIGHT}" stroke="{_GRID}"/>')
        parts.append(_text(left + 76, y(mark) + 4, text(mark), "end"))
    for length in lengths:
        parts.append(_text(x(length), _HEIGHT - _BOTTOM + 18, f"{length:,}", "middle"))
    parts.append(_text(left + _WIDTH - 2 * _RIGHT, _HEIGHT - 8, "tokens", "end"))
    for name, line, colour, place in zip(("before", "after"), series, _COLOURS, (190, 90), strict=True):
        drawn = [(x(n), y(value)) for n, value in line if value > 0]
        where = " ".join(f"{a:.1f},{b:.1f}" for a, b in drawn)
        parts.append(f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in drawn]
        parts.append(f'<path d="M{left + _WIDTH - place - 26} 18h18" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(left + _WIDTH - place, 22, name, "start"))
    return parts


def _log_marks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where they would be few, from just below the lowest to just above the highest.

    Args:
        low, high: decimal logarithms.
    """
    exponents = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 2.5 else (1, 2, 5)
    marks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    start = max((i for i, mark in enumerate(marks) if math.log10(mark) <= low + 1e-9), default=0)
    end = min((i for i, mark in enumerate(marks) if math.log10(mark) >= high - 1e-9), default=len(marks) - 1)
    return marks[start : end + 1]


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
