"""Cost by length of the prompt as rows of text, for every renderer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from compress.architectures.cache import bytes_at
from compress.errors import ReportError
from compress.formatting import format_bytes, ratio, ratio_of, seconds_text, significant


class LengthRow(NamedTuple):
    """One quantity at one length, as text; ``change``: its ratio with bounds, and the ratio of CPU seconds."""

    name: str
    before: str
    after: str
    change: tuple[str, str]


#: Path of a prompt ▶ its name in tables.
_PATHS = {"compress_local": "our attention", "chunks": "in chunks"}
#: Path ▶ how to take it, in sentences.
_WAYS = {
    "chunks": "in chunks (`prefill_chunk_size`, as `generate` reads them)",
    "compress_local": "by our attention function (`compress.load`)",
}
#: Columns of `length_cells`.
HEAD = ("prompt", "", "before", "after", "change", "CPU")


def length_rows(original: Mapping[str, Any], result: Mapping[str, Any]) -> list[tuple[int, list[LengthRow]]]:
    """(length, its rows) of time, cache and memory; empty where no lengths were measured.

    Args:
        original, result: parts of a report or of documents of an evaluation, with ``latency`` and ``size``.
    """
    before, after = ((side["latency"] or {}).get("lengths") or [] for side in (original, result))
    return [(x["length"], _rows(x, y, original, result)) for x, y in zip(before, after, strict=False)]


def length_cells(original: Mapping[str, Any], result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of a table headed by `HEAD`; the first row of a length names it."""
    return [
        (f"{length:,}" if i == 0 else "", row.name, row.before, row.after, *row.change)
        for length, rows in length_rows(original, result)
        for i, row in enumerate(rows)
    ]


def _rows(
    x: Mapping[str, Any], y: Mapping[str, Any], original: Mapping[str, Any], result: Mapping[str, Any]
) -> list[LengthRow]:
    rows = [_timed("prefill", x["prefill"], y["prefill"])]
    ways = [{path["path"]: path["prefill"] for path in row["paths"]} for row in (x, y)]
    for path in dict.fromkeys([*ways[0], *ways[1]]):
        rows.append(_timed(_PATHS.get(path, path), ways[0].get(path), ways[1].get(path)))
    if x["decode"] is not None and y["decode"] is not None:
        rows.append(_timed("decode a token", x["decode"], y["decode"]))
    if (cache := cache_bytes_at(x, y, original, result)) is not None:
        rows.append(_bytes("cache, as counted" if cache_counted(original, result) else "cache", *cache))
    rows.append(_bytes("memory", x["memory"]["peak"], y["memory"]["peak"]))
    return rows


def cache_bytes_at(
    x: Mapping[str, Any], y: Mapping[str, Any], original: Mapping[str, Any], result: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Bytes of both caches at the length of rows ``x`` and ``y``; None without a cache.

    They follow from the headers, in the format of the configs; where these do not tell (`cache_counted`), they are as counted,
    in the format of the computation.
    """
    if not cache_counted(original, result):
        before, after = (bytes_at(side["size"]["cache"], x["length"]) for side in (original, result))
        return before, after
    return None if None in (x["cache"], y["cache"]) else (x["cache"]["bytes"], y["cache"]["bytes"])


def cache_counted(original: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether headers do not tell the cache at every length that was measured, so that all lengths show counted bytes.

    The two formats may differ, so no table or picture mixes them.
    """
    sides = (original, result)
    if any(side["size"].get("cache") is None for side in sides):
        return True
    try:
        for side in sides:
            for row in (side["latency"] or {}).get("lengths") or []:
                bytes_at(side["size"]["cache"], row["length"])
    except ReportError:  # a pattern at a length that reports do not know
        return True
    return False


def _timed(name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> LengthRow:
    change, cpu = "", ""
    if after is not None and after.get("ratio") is not None:
        change = f"{ratio(after['ratio'])} ({significant(after['lower'])} to {significant(after['upper'])})"
        cpu = ratio(after["cpu"]["ratio"]) if after.get("cpu") else ""
    shown = ["" if timing is None else seconds_text(timing["median"]) for timing in (before, after)]
    return LengthRow(name, shown[0], shown[1], (change, cpu))


def _bytes(name: str, before: int, after: int) -> LengthRow:
    return LengthRow(name, format_bytes(before), format_bytes(after), (ratio_of(before, after), ""))


def length_notes(original: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """Sentences on the fit of n², on lengths that were not tried, and on caches that differ from the plan."""
    sides = [side["latency"] or {} for side in (original, result)]
    if not sides[0].get("lengths") and not sides[1].get("not_tried"):
        return []
    notes = [*_slower_notes(sides[1].get("lengths") or ()), *_fit_notes([side.get("fit") or {} for side in sides])]
    for way in sides[1].get("path_fits") or ():
        notes += _path_note(way["path"], (sides[0].get("fit") or {}), way["fit"])
    notes += [f"{row['length']:,} tokens were not tried: it {row['reason']}" for row in sides[1].get("not_tried") or ()]
    for name, side in zip(("original", "result"), sides, strict=True):
        for row in side.get("lengths") or ():
            cache = row["cache"]
            if cache is not None and cache["planned"] not in (None, cache["values"]):
                notes.append(
                    f"the {name} caches {cache['values']:,} numbers after {row['length']:,} tokens, "
                    f"and its headers say {cache['planned']:,}"
                )
    return notes


def _slower_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence where stock transformers reads prompts slower than it reads the original's, and what reads them faster."""
    slower = [row for row in rows if (row["prefill"].get("lower") or 0) > 1]
    if not slower:
        return []
    lengths, last = ", ".join(f"{row['length']:,}" for row in slower), slower[-1]
    ratios = {path["path"]: path["prefill"].get("ratio") for path in last["paths"]}
    ways = [f"{name} {ratio(ratios[path])}" for path, name in _WAYS.items() if ratios.get(path) is not None]
    text = f"stock transformers reads prompts of {lengths} tokens slower than the original's"
    return [
        f"{text}: {last['length']:,} tokens take {ratio(last['prefill']['ratio'])}" + "".join(f"; {w}" for w in ways)
    ]


def _fit_notes(fits: Sequence[Mapping[str, Any]]) -> list[str]:
    before, after = fits
    if before.get("c") is None or after.get("c") is None:
        doubt = before.get("doubt") or after.get("doubt")
        return [f"prefill is not fitted: {doubt}"] if doubt else []
    clock = "CPU seconds" if before["clock"] == "cpu" else "seconds"
    change = f" ({ratio(after['c'] / before['c'])})" if before["c"] else ""
    halves = " ▶ ".join(_half(fit["half"]) for fit in fits)
    notes = [
        f"prefill takes a + b·n + c·n² {clock} for n tokens: c {before['c']:.3g} ▶ {after['c']:.3g}{change}; "
        f"c·n² is half of it at {halves} tokens"
    ]
    for name, fit in zip(("original", "result"), fits, strict=True):
        if fit["doubt"]:
            notes.append(f"c of the {name} is not to be relied on: {fit['doubt']}")
    return notes


def _path_note(path: str, before: Mapping[str, Any], fit: Mapping[str, Any]) -> list[str]:
    """The fit of another way to read prompts, beside the stock one of the original; nothing where one is not fitted."""
    if before.get("c") is None or fit["c"] is None:
        return []
    change = f" ({ratio(fit['c'] / before['c'])} of the original's)" if before["c"] else ""
    doubt = f"; {fit['doubt']}" if fit["doubt"] else ""
    return [
        f"{_PATHS.get(path, path)}: c {fit['c']:.3g}{change}, half of the time at {_half(fit['half'])} tokens{doubt}"
    ]


def _half(length: float | None) -> str:
    return "no number of" if length is None else f"{length:,.0f}" if length < 1e7 else f"{length:.2g}"
