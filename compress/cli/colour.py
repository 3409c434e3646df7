"""Colours of a terminal: where they are shown, and text in them."""

from __future__ import annotations

import os
import re
from typing import IO

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
_PLACE = re.compile(r"^\S+:\d+(:\d+)?:", re.MULTILINE)
_CARETS = re.compile(r"(?<=\| )( *)(\^+)$", re.MULTILINE)


def shows_colour(stream: IO[str]) -> bool:
    """Whether a stream is a terminal with colours; ``NO_COLOR`` and ``FORCE_COLOR`` win."""
    terminal = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return terminal or bool(os.environ.get("FORCE_COLOR"))


def styled(text: str, style: str) -> str:
    """Text in a style, such as ``bold red``."""
    codes = ";".join(_CODES[word] for word in style.split())
    return f"\x1b[{codes}m{text}\x1b[0m" if codes and text else text


def styled_mistakes(text: str) -> str:
    """Mistakes in a recipe with their places bold and their carets red."""
    text = _PLACE.sub(lambda match: styled(match[0], "bold"), text)
    return _CARETS.sub(lambda match: match[1] + styled(match[2], "bold red"), text)
