"""A strip for each gate: the value with its interval as whiskers, and the bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from compress.report.pictures.svg import WIDTH, Picture, Scale

_HEIGHT, _MARGIN, _Y = 34, 12, 17


def gate_strip(gate: Mapping[str, Any]) -> Picture | None:
    """Value and interval of a gate beside its bound, each strip on an axis of its own; the side that fails is shaded.

    None where there is no finite value.
    """
    value, bound = gate["value"], gate["bound"]
    ends = [end for end in (gate["lower"], gate["upper"]) if end is not None]
    if value is None or not all(map(math.isfinite, [value, bound, *ends])):
        return None
    neutral = 1.0 if gate["unit"] == "ratio" else 0.0
    known = [value, bound, *ends] + ([neutral] if gate["unit"] in ("ratio", "relative", "points") else [])
    low, high = min(known), max(known)
    margin = 0.08 * (high - low) or abs(high) or 1.0
    x = Scale(low - margin, high + margin, _MARGIN, WIDTH - _MARGIN)
    at, kind = x(bound), gate["verdict"]
    start, end = (_MARGIN, at) if gate["gate"].split(" ")[0].endswith(".min") else (at, WIDTH - _MARGIN)
    parts = [
        f'<rect class="fail" opacity="0.15" x="{start:.1f}" y="3" width="{end - start:.1f}" height="28"/>',
        f'<path class="grid-line" d="M{_MARGIN} {_Y}H{WIDTH - _MARGIN}"/>',
        f'<path class="dim-line" d="M{at:.1f} 3V31" stroke-width="2"/>',
    ]
    if len(ends) == 2:
        whiskers = f"M{x(ends[0]):.1f} {_Y}H{x(ends[1]):.1f}" + "".join(f"M{x(end):.1f} {_Y - 7}v14" for end in ends)
        parts.append(f'<path class="{kind}-line" d="{whiskers}" stroke-width="2"/>')
    parts.append(f'<circle class="{kind}" cx="{x(value):.1f}" cy="{_Y}" r="6"/>')
    return Picture(f"{gate['gate']}: {gate['text']}", _HEIGHT, tuple(parts))
