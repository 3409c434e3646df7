"""Entry points of other packages: passes, architectures, metrics. Without any, importlib.metadata is not imported (20 ms)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


def entry_points(group: str) -> Iterable[EntryPoint]:
    """The entry points of a group, of all installed packages."""
    if not any(f"[{group}]" in _declared(place) for place in tuple(sys.path)):
        return ()
    from importlib import metadata

    return metadata.entry_points(group=group)


@cache
def _declared(place: str) -> str:
    """The text of all ``entry_points.txt`` of packages in a folder."""
    if not Path(place).is_dir():
        return ""
    with os.scandir(place or ".") as entries:
        packages = [entry.path for entry in entries if entry.name.endswith((".dist-info", ".egg-info"))]
    files = (Path(package, "entry_points.txt") for package in packages)
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())
