"""Damage by block and matrix, as rows and levels of a heat map."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compress.formatting import significant
from compress.passes.details import PassDetails
from compress.report.detail_rows import inside_block

#: Number of colours.
LEVELS = 10
#: Most columns of which the values are shown in the cells.
FEW = 12
_NUMBER = re.compile(r"\.(\d+)\.")
#: Colours of the lowest, the middle and the highest level, red, green, blue: on light ground, and on dark ground.
_LIGHT = ((255, 247, 236), (252, 141, 89), (127, 0, 0))
_DARK = ((38, 30, 26), (166, 74, 28), (255, 214, 170))


@dataclass(frozen=True, slots=True)
class Cell:
    """One value: its level from 0 to `LEVELS` - 1, its text, and what it is of."""

    level: int
    text: str
    title: str


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Values by matrix (rows) and block (columns). ``few``: cells have room for their values. low, high: as text."""

    title: str
    blocks: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    low: str
    high: str

    @property
    def few(self) -> bool:
        """Whether there are few columns."""
        return len(self.blocks) <= FEW


def heat_maps(name: str, details: PassDetails) -> Iterator[HeatMap]:
    """Maps of a pass: relative errors of outputs, and divergences expected from rounding, where it reports them."""
    errors = [
        (str(block["block"]), _role(matrix, block["block"]), error)
        for block in details.get("blocks", ())
        for matrix, row in block.get("tensors", {}).items()
        if (error := row.get("error")) is not None
    ]
    if errors:
        yield from _map(f"{name}: relative error of outputs", errors)
    losses = [
        (number[1], _role(row["tensor"], int(number[1])), row["divergence"])
        for row in details.get("formats", ())
        if (number := _NUMBER.search(row["tensor"]))
    ]
    if losses:
        yield from _map(f"{name}: divergence expected from rounding, nats per token", losses)


def _role(matrix: str, block: int) -> str:
    """Name of a matrix inside its block; the number of an expert is a star."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", inside_block(matrix, block))


def _map(title: str, values: Iterable[tuple[str, str, float]]) -> Iterator[HeatMap]:
    """A map of (block, role, value); values of one place, such as of experts, are averaged. Nothing without a finite value."""
    places: dict[tuple[str, str], list[float]] = defaultdict(list)
    for block, role, value in values:
        if math.isfinite(value):
            places[block, role].append(value)
    if not places:
        return
    means = {place: sum(of) / len(of) for place, of in places.items()}
    low, high = min(means.values()), max(means.values())
    blocks = list(dict.fromkeys(block for block, _ in means))
    rows = []
    for role in dict.fromkeys(role for _, role in means):
        cells = [_cell(means.get((block, role)), f"{block} {role}", low, high) for block in blocks]
        rows.append((role, cells))
    yield HeatMap(title, blocks, rows, _text(low), _text(high))


def _cell(value: float | None, where: str, low: float, high: float) -> Cell | None:
    if value is None:
        return None
    share = (value - low) / (high - low) if high > low else 0.0
    return Cell(min(int(LEVELS * share), LEVELS - 1), _text(value), where)


def _text(value: float) -> str:
    return significant(value)


def heat_rules(*, dark: bool) -> str:
    """CSS of the levels: colours, and a colour of text that can be read on each."""
    stops: tuple[tuple[int, int, int], ...] = _DARK if dark else _LIGHT
    return "".join(_level_rule(level, _blend(stops, level / (LEVELS - 1))) for level in range(LEVELS))


def _blend(stops: tuple[tuple[int, int, int], ...], share: float) -> tuple[int, ...]:
    first, second = stops[:2] if share < 0.5 else stops[1:]
    part = 2 * share if share < 0.5 else 2 * share - 1
    return tuple(round(a + part * (b - a)) for a, b in zip(first, second, strict=True))


def _level_rule(level: int, colour: tuple[int, ...]) -> str:
    text = "#000000" if _luminance(colour) > 0.179 else "#ffffff"  # where both have a contrast of 4.58 (WCAG 2.2)
    return f".h{level}{{background:#{''.join(f'{part:02x}' for part in colour)};color:{text}}}"


def _luminance(colour: Iterable[int]) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [c / 12.92 if (c := part / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for part in colour]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def removal_losses(details: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(block, loss without it) before any block was removed; empty where depth was not chosen by losses."""
    rounds = details.get("loss_without_block") or [{}]
    return [(str(block), float(loss)) for block, loss in rounds[0].items()]
