"""Numbers as text. The terminal, reports, cards and gates use these, so one number has the same digits everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable

#: Powers of ten beyond which numbers have an exponent.
_SMALL, _LARGE = -6, 15


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, zeros at the end included: ``34.0``; all digits of a larger integer part."""
    if not math.isfinite(value):
        return f"{value}"
    exponent = _exponent(value, digits)
    if value and not _SMALL < exponent < _LARGE:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - exponent, 0)}f}"


def fixed(value: float, decimals: int) -> str:
    """A number with so many decimals. Small ones have two significant digits, so that none but 0 is shown as 0."""
    if not math.isfinite(value):
        return f"{value}"
    exponent = _exponent(value, 2)
    if value and (exponent < 1 - decimals or exponent >= _LARGE):
        return significant(value, 2)
    return f"{value:,.{decimals}f}"


def signed(value: float, decimals: int) -> str:
    """As `fixed`, with a plus sign where it is not negative."""
    text = fixed(value, decimals)
    return text if text.startswith("-") else f"+{text}"


def percent(share: float) -> str:
    """A share as a percentage with two decimals."""
    return f"{fixed(100 * share, 2)}%"


def signed_percent(share: float) -> str:
    """A relative change as a percentage with two decimals and its sign."""
    return f"{signed(100 * share, 2)}%"


def ratio(value: float) -> str:
    """A ratio, ``× 0.539``."""
    return f"× {significant(value)}"


def ratio_of(before: float, after: float) -> str:
    """The ratio of two amounts; nothing where the first is 0."""
    return ratio(after / before) if before else ""


def seconds_text(seconds: float) -> str:
    """Seconds with three significant digits, in ms below one second."""
    return f"{significant(seconds * 1000)} ms" if seconds < 1 else f"{significant(seconds)} s"


def format_bytes(count: float, digits: int = 3) -> str:
    """Bytes in readable units, such as ``8.21 MB`` (10^6)."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{significant(count / size, digits)} {unit}"
    return f"{count:.0f} B"


def apart(value: float, bound: float, show: Callable[[float, int], str]) -> tuple[str, str]:
    """Two numbers as text, with three significant digits or as many as tell them apart."""
    digits = next((n for n in range(3, 10) if value == bound or show(value, n) != show(bound, n)), 3)
    return show(value, digits), show(bound, digits)


def _exponent(value: float, digits: int) -> int:
    """The decimal exponent of a finite number, rounded to so many significant digits."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])
