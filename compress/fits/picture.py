"""The costs that a search measured as a picture: nats per token of each family and of bits, by the bytes that remain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.formatting import format_bytes
from compress.report.pictures.svg import WIDTH, Picture, Scale, heading, log_marks, text, ticks, width_of, y_axis

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 84, 28, 56, 52
#: Least divergence that is drawn, nats per token.
_LEAST = 1e-5


def costs_picture(document: Mapping[str, Any]) -> Picture | None:
    """The picture; None where fewer than two amounts have a cost."""
    lines = _lines(document)
    tried = [(row["bytes"], max(row["measured"], _LEAST)) for row in document["finalists"]]
    points = [*tried, *(point for line in lines.values() for point in line)]
    if len(points) < 2:
        return None
    whole = float(document["original"])
    marks = log_marks(min(y for _, y in points), max(max(y for _, y in points), 2 * _LEAST))
    up = Scale(marks[0], marks[-1], _HEIGHT - _BOTTOM, _TOP, 10)
    across = Scale(0, whole, _LEFT, WIDTH - _RIGHT)
    parts = [
        heading("nats per token by bytes"),
        text(12, 42, "each family alone; numbered: finalists; line: the bound"),
    ]
    parts += y_axis(up, marks, lambda mark: f"{mark:g}", WIDTH - _RIGHT, _LEFT)
    for mark in [mark for mark in ticks(0, whole) if mark <= whole][::2]:
        parts.append(text(across(mark), _HEIGHT - _BOTTOM + 20, format_bytes(int(mark)), anchor="middle"))
    parts.append(text(WIDTH - _RIGHT, _HEIGHT - 12, "bytes of the weight files", anchor="end"))
    bound = across(document["bound"])
    parts.append(f'<path class="fail-line" d="M{bound:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke-dasharray="4 4"/>')
    taken: list[tuple[float, float, float]] = []
    for name, line in lines.items():
        parts += _line(name, [(across(x), up(y)) for x, y in line], taken)
    for number, (x, y) in enumerate(tried, 1):
        parts.append(f'<circle class="second" cx="{across(x):.1f}" cy="{up(y):.1f}" r="9"/>')
        parts.append(text(across(x), up(y) + 4.5, str(number), anchor="middle", size=12, kind="ground"))
    return Picture(f"nats per token by bytes, of {len(lines)} families", _HEIGHT, tuple(parts))


def _lines(document: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Bytes and divergence of each family's amounts, and of bits."""
    rows = {"bits": document["bits"], **document["families"]}
    return {name: [(size, max(cost, _LEAST)) for _, cost, size in amounts] for name, amounts in rows.items() if amounts}


def _line(name: str, points: Sequence[tuple[float, float]], taken: list[tuple[float, float, float]]) -> list[str]:
    """A family: its points, a line through them, and its name beside the last one, where there is room."""
    kind = "first" if name == "bits" else "dim"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<polyline class="{kind}-line" points="{path}" stroke-width="2"/>'] if len(points) > 1 else []
    parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points]
    name = name.replace("_", " ")
    x, y = min(points)
    width = width_of(name)
    start = x - 8 - width if x - 8 - width > _LEFT else x + 8
    while any(abs(y - other) < 14 and start < end and first < start + width for first, end, other in taken):
        y -= 14
    taken.append((start, start + width, y))
    return [*parts, text(start, y + 4, name, kind=kind)]
