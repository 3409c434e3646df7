"""A bar for each block of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from compress.report.pictures.svg import WIDTH, Picture, Scale, heading, mark_text, shown, text, ticks, width_of, y_axis

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 240, 72, 16, 40, 48


def block_bars(
    title: str, values: Sequence[tuple[str, float]], marked: Collection[str], show: Callable[[float], str]
) -> Picture | None:
    """A bar for each block by name; those that are ``marked`` have the other colour. None without a finite value."""
    known = [(name, value) for name, value in values if math.isfinite(value) and value >= 0]
    if not known:
        return None
    marks = ticks(0, max(value for _, value in known))
    y = Scale(0, marks[-1], _HEIGHT - _BOTTOM, _TOP)
    width = (WIDTH - _LEFT - _RIGHT) / len(known)
    every = 1 + int(max(width_of(name) + 6 for name, _ in known) / width)
    parts = [heading(title), *y_axis(y, marks, mark_text(marks), WIDTH - _RIGHT, _LEFT)]
    for number, (name, value) in enumerate(known):
        left = _LEFT + width * number
        place = (
            f'x="{left + 0.1 * width:.1f}" y="{y(value):.1f}" width="{0.8 * width:.1f}" height="{y(0) - y(value):.1f}"'
        )
        kind = "second" if name in marked else "first"
        parts.append(f'<rect class="{kind}" {place}><title>{shown(f"{name}: {show(value)}")}</title></rect>')
        if number % every == 0:
            parts.append(text(left + width / 2, _HEIGHT - _BOTTOM + 18, name, anchor="middle"))
    parts.append(text(WIDTH - _RIGHT, _HEIGHT - 8, "block", anchor="end"))
    return Picture(title, _HEIGHT, tuple(parts))
