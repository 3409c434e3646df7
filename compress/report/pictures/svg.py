"""Small functions that draw SVG: colours by class, texts, axes, and the two ways to show a picture.

A picture has a light and a dark look. In a page its classes take the page's colours. As a file it brings its own, for both
values of ``prefers-color-scheme``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from compress.escape import in_one_line

#: Width of every picture, so that two of them stand side by side and one fits a telephone.
WIDTH = 480
#: Colours by name. ``first`` is the original, or training; ``second`` the result, or held-out data.
LIGHT = {
    "ground": "#ffffff",
    "panel": "#f6f8fa",
    "ink": "#1f2328",
    "dim": "#59636e",
    "grid": "#d1d9e0",
    "first": "#0969da",
    "second": "#bc4c00",
    "saved": "#b6d7f8",
    "pass": "#1a7f37",
    "fail": "#cf222e",
    "inconclusive": "#9a6700",
}
DARK = {
    "ground": "#0d1117",
    "panel": "#161b22",
    "ink": "#e6edf3",
    "dim": "#9198a1",
    "grid": "#3d444d",
    "first": "#4493f8",
    "second": "#f0883e",
    "saved": "#1f3f66",
    "pass": "#3fb950",
    "fail": "#f85149",
    "inconclusive": "#d29922",
}
_FILLS = ("ink", "dim", "ground", "first", "second", "saved", "pass", "fail", "inconclusive")
_STROKES = ("grid", "dim", "first", "second", "pass", "fail", "inconclusive")


@dataclass(frozen=True, slots=True)
class Picture:
    """An SVG picture of `WIDTH` units. ``title`` says what it shows. ``body``: elements."""

    title: str
    height: float
    body: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scale:
    """A map from values to coordinates: linear, or logarithmic to the base ``log``.

    Attributes:
        low, high: values at the coordinates ``start`` and ``end``.
    """

    low: float
    high: float
    start: float
    end: float
    log: int | None = None

    def __call__(self, value: float) -> float:
        """Coordinate of a value."""
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / ((high - low) or 1)


def rules(colours: Mapping[str, str], prefix: str = "") -> str:
    """CSS of the classes of pictures."""
    fills = [f"{prefix}.{name}{{fill:{colours[name]}}}" for name in _FILLS]
    strokes = [f"{prefix}.{name}-line{{stroke:{colours[name]};fill:none}}" for name in _STROKES]
    return "".join([*fills, *strokes])


def standalone(picture: Picture) -> str:
    """The picture as a file."""
    size = f'width="{WIDTH}" height="{picture.height:g}" viewBox="0 0 {WIDTH} {picture.height:g}"'
    style = f"{rules(LIGHT)}@media (prefers-color-scheme:dark){{{rules(DARK)}}}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui,sans-serif">'
    ground = f'<rect class="ground" width="{WIDTH}" height="{picture.height:g}"/>'
    parts = [head, f"<title>{shown(picture.title)}</title>", f"<style>{style}</style>", ground, *picture.body]
    return "\n".join([*parts, "</svg>", ""])


def inline(picture: Picture) -> str:
    """The picture as an element of a page, which has the `rules`."""
    box = f"0 0 {WIDTH} {picture.height:g}"
    return f'<svg viewBox="{box}" role="img" aria-label="{shown(picture.title)}">{"".join(picture.body)}</svg>'


def stacked(title: str, pictures: Iterable[Picture]) -> Picture:
    """Pictures below one another as one."""
    body, top = [], 0.0
    for picture in pictures:
        body += [f'<g transform="translate(0 {top:g})">', *picture.body, "</g>"]
        top += picture.height
    return Picture(title, top, tuple(body))


def shown(text: str) -> str:
    """Foreign text inside an element or an attribute."""
    return escape(in_one_line(text))


def text(x: float, y: float, content: str, *, anchor: str = "start", size: float = 13, kind: str = "dim") -> str:
    """A text. ``anchor``: start, middle or end. ``kind``: its colour."""
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}"' + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    return f'<text class="{kind}" {place}>{shown(content)}</text>'


def cut(content: str, width: float, size: float = 13) -> str:
    """Text of at most a width, by the mean width of letters; ``…`` stands for the rest."""
    most = int(width / (0.56 * size))
    return content if len(content) <= most else content[: max(most - 1, 0)] + "…"


def width_of(content: str, size: float = 13) -> float:
    """About the width of a text."""
    return 0.56 * size * len(content)


def grid_line(y: float, left: float, right: float) -> str:
    """A horizontal line of a grid."""
    return f'<path class="grid-line" d="M{left:g} {y:.1f}H{right:g}"/>'


def heading(title: str) -> str:
    """The title of a picture."""
    return text(12, 22, cut(title, WIDTH - 24, 15), size=15, kind="ink")


def y_axis(scale: Scale, marks: Sequence[float], show: Callable[[float], str], right: float, left: float) -> list[str]:
    """Grid lines at marks, and their values left of it."""
    parts = []
    for mark in marks:
        parts += [grid_line(scale(mark), left, right), text(left - 8, scale(mark) + 4, show(mark), anchor="end")]
    return parts


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from just below the lowest to just above the highest."""
    span = high - low if high > low else abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first, final = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, final + 1)]


def mark_text(marks: Sequence[float]) -> Callable[[float], str]:
    """Text of equally spaced marks, with the decimals that their step needs."""
    step = marks[1] - marks[0] if len(marks) > 1 else abs(marks[0]) or 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return lambda value: f"{value:,.{decimals}f}"


def log_marks(low: float, high: float) -> list[float]:
    """Powers of ten from just below the lowest to just above the highest, with 2 and 5 between them where they would be few."""
    low, high = math.log10(low), math.log10(high)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 2.5 else (1, 2, 5)
    marks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    start = max((i for i, mark in enumerate(marks) if math.log10(mark) <= low + 1e-9), default=0)
    end = min((i for i, mark in enumerate(marks) if math.log10(mark) >= high - 1e-9), default=len(marks) - 1)
    return marks[start : end + 1]
