"""Draw docs/_static/attention-*.svg: the tokens that a query sees in each pattern, and what stays in the cache.

The rules are those of `compress.checkpoint.attention`, written out again for one pair of positions; a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

INK, SOFT, UNSEEN = "#1b2733", "#5a6b7b", "#e6ebf0"
#: Reason why a key is seen ▶ colour. The colours differ in brightness too.
COLOURS = {"near": "#3b7dc4", "first": "#c2571a", "far": "#6cc08b"}
#: The same in words.
WORDS = {"near": "near", "first": "sinks: the first tokens", "far": "far"}
TOKENS, WINDOW, SINKS = 24, 6, 2


@dataclass(frozen=True)
class Panel:
    """One pattern: title, what a token sees, what it costs, and the reason why query i sees key j (None: it does not)."""

    title: str
    about: str
    cost: str
    reason: Callable[[int, int], str | None]


def _full(i: int, j: int) -> str | None:
    return "near"


def _window(i: int, j: int) -> str | None:
    return "near" if i - j < WINDOW else None


def _sinks(i: int, j: int) -> str | None:
    return "first" if j < SINKS else _window(i, j)


def _strided(i: int, j: int) -> str | None:
    return _window(i, j) or ("far" if j % WINDOW == WINDOW - 1 else None)


def _strided_back(i: int, j: int) -> str | None:
    return _window(i, j) or ("far" if (i - j) % WINDOW == 0 else None)


def _chunks(i: int, j: int) -> str | None:
    return "near" if i // WINDOW == j // WINDOW else None


def _strided_block(i: int, j: int) -> str | None:
    return _chunks(i, j) or ("far" if (i - j) % WINDOW == 0 else None)


def _fixed(i: int, j: int) -> str | None:
    return _chunks(i, j) or ("far" if j % WINDOW == WINDOW - 1 else None)


PANELS = {
    "full": Panel("full", "every token before", "pairs ~ n²/2, cache n", _full),
    "window": Panel("window", "the last w tokens", "pairs ~ n·w, cache w − 1", _window),
    "sinks": Panel("window + sinks", "and the first s tokens", "pairs ~ n·(w + s), cache w + s", _sinks),
    "strided": Panel("strided", "window, every l-th of the text", "pairs ~ n·(w + n/2l), cache w + n/l", _strided),
    "fixed": Panel("fixed", "stretch, and the last of others", "pairs ~ n·(l + n/l)/2, cache l + n/l", _fixed),
    "chunks": Panel("chunks", "the own stretch alone", "pairs ~ n·l/2, cache up to l", _chunks),
    "strided_back": Panel(
        "strided, counted back", "window, every l-th token back", "pairs ~ n·(w + n/2l), cache n", _strided_back
    ),
    "strided_block": Panel(
        "stretch and strided", "stretch, every l-th token back", "pairs ~ n·(l + n/l)/2, cache n", _strided_block
    ),
}


def pictures() -> dict[str, str]:
    """The SVG pictures by file name."""
    return {
        "attention-patterns.svg": patterns(),
        "attention-choice.svg": choice(),
        "attention-cache.svg": cache(),
    }


def patterns() -> str:
    """A grid of queries (down) by keys (across) for each pattern, and the legend."""
    cell, side, step, high = 7, TOKENS * 7, 212, 256
    parts = []
    for number, panel in enumerate(PANELS.values()):
        x, y = 24 + number % 4 * step, 74 + number // 4 * high
        parts += [_text(x, y - 42, panel.title, INK, 14, 600), _text(x, y - 25, panel.about, SOFT, 11)]
        parts += [_text(x, y - 9, panel.cost, SOFT, 11), *_grid(x, y, cell, panel.reason)]
    y = 74 + high + side + 26
    parts += _legend(24, y)
    for row, line in enumerate(
        (
            "each row is a token that asks, each column one that it may see",
            f"here w = l = {WINDOW}, s = {SINKS}; the last two are in our attention function alone",
        )
    ):
        parts.append(_text(24 + 2 * step, y + 11 + 20 * row, line, SOFT, 12))
    return _svg(24 + 4 * step, y + 48, "The tokens that each pattern of attention sees", parts)


def _grid(x: int, y: int, cell: int, reason: Callable[[int, int], str | None]) -> list[str]:
    """The cells of a pattern, one path of a colour."""
    paths: dict[str, list[str]] = {}
    for i in range(TOKENS):
        for j in range(i + 1):
            why, side = reason(i, j), cell - 1
            colour = UNSEEN if why is None else COLOURS[why]
            paths.setdefault(colour, []).append(f"M{x + j * cell} {y + i * cell}h{side}v{side}h-{side}z")
    return [f'<path fill="{colour}" d="{"".join(cells)}"/>' for colour, cells in paths.items()]


def _legend(x: int, y: int) -> list[str]:
    parts = []
    for number, (colour, text) in enumerate(
        [*((COLOURS[why], text) for why, text in WORDS.items()), (UNSEEN, "not seen")]
    ):
        left, top = x + 190 * (number % 2), y + 22 * (number // 2)
        parts.append(f'<rect x="{left}" y="{top}" width="13" height="13" rx="2" fill="{colour}"/>')
        parts.append(_text(left + 21, top + 11, text, INK, 12))
    return parts


#: KV heads that stay full where heads are chosen: (block, head).
_HEADS = {(2, 1), (4, 0), (4, 2), (6, 1), (7, 0), (9, 2), (10, 1), (5, 2), (8, 1)}
_LAYERS = {2, 4, 9}


def choice() -> str:
    """Which KV heads of a model of twelve blocks stay full: all of every fourth block, of chosen blocks, or chosen heads."""
    blocks, heads, cell = 12, 3, 18
    ways = [
        ("every 4th block", "choose: every", {(b, h) for b in range(0, blocks, 4) for h in range(heads)}),
        ("chosen blocks", "by: layers", {(b, h) for b in _LAYERS for h in range(heads)}),
        ("chosen heads", "by: heads", _HEADS),
    ]
    parts = [_text(14, 92 + cell * row, f"block {row}", SOFT, 11) for row in range(blocks)]
    for number, (title, setting, full) in enumerate(ways):
        x, y = 92 + number * 190, 78
        parts += [
            _text(x, y - 44, title, INK, 14, 600),
            _text(x, y - 26, setting, SOFT, 12),
            _text(x, y - 7, "KV heads 0 1 2", SOFT, 11),
        ]
        for block in range(blocks):
            for head in range(heads):
                colour = INK if (block, head) in full else "#a9c9ea"
                parts.append(
                    f'<rect x="{x + head * 34}" y="{y + block * cell}" width="32" height="{cell - 2}" rx="2" fill="{colour}"/>'
                )
    x = 92 + 3 * 190
    for row, (colour, text) in enumerate(((INK, "full"), ("#a9c9ea", "window"))):
        parts.append(f'<rect x="{x}" y="{78 + 24 * row}" width="32" height="{cell - 2}" rx="2" fill="{colour}"/>')
        parts.append(_text(x + 42, 91 + 24 * row, text, INK, 12))
    parts.append(_text(x, 150, "each way keeps", SOFT, 11))
    parts.append(_text(x, 166, "9 of 36 heads full", SOFT, 11))
    return _svg(800, 78 + blocks * cell + 16, "Which KV heads go on seeing every token", parts)


def cache() -> str:
    """The tokens of a text of 48 that are still cached, so that the next token can see them."""
    tokens, cell = 48, 13
    rows = [
        ("full", lambda j: "near"),
        ("window", lambda j: "near" if tokens - j < WINDOW else None),
        ("window + sinks", lambda j: "first" if j < SINKS else "near" if tokens - j < WINDOW else None),
        ("strided", lambda j: "near" if tokens - j < WINDOW else "far" if j % WINDOW == WINDOW - 1 else None),
        (
            "fixed",
            lambda j: "near" if j // WINDOW == (tokens - 1) // WINDOW else "far" if j % WINDOW == WINDOW - 1 else None,
        ),
        ("chunks", lambda j: "near" if j // WINDOW == (tokens - 1) // WINDOW else None),
    ]
    parts = [
        _text(150, 26, "first token", SOFT, 11),
        _text(150 + tokens * cell, 26, "last token", SOFT, 11, anchor="end"),
    ]
    for row, (name, reason) in enumerate(rows):
        y = 36 + row * 24
        parts.append(_text(14, y + 13, name, INK, 13, 600))
        for j in range(tokens):
            why = reason(j)
            colour = UNSEEN if why is None else COLOURS[why]
            parts.append(f'<rect x="{150 + j * cell}" y="{y}" width="{cell - 1}" height="17" rx="2" fill="{colour}"/>')
        kept = sum(reason(j) is not None for j in range(tokens))
        parts.append(_text(162 + tokens * cell, y + 13, f"{kept} of {tokens}", INK, 12))
    return _svg(860, 36 + len(rows) * 24 + 10, "The tokens that stay in the cache", parts)


def _svg(width: int, height: int, label: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" role="img" aria-label="{escape(label)}">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>', *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, fill: str, size: int, weight: int = 400, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
