"""What a folder of ours holds, and whether anybody has changed it.

A table has a row for each file: ``stamp`` (`files.stamp`) and ``sha256``. A file with its old stamp is taken as unchanged; one
with another is read and compared by SHA-256; so are all, where bytes are about to be published or replaced.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG
from typing import Any

from compress.files import sha256, stamp

Table = dict[str, dict[str, Any]]


def entries(folder: Path) -> dict[str, os.stat_result]:
    """All below a folder that is no folder, by relative path; links are not followed."""
    found = {}
    for root, folders, files in os.walk(folder):
        links = (name for name in folders if (Path(root) / name).is_symlink())
        for name in (*files, *links):
            path = Path(root) / name
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                found[str(path.relative_to(folder))] = path.lstat()
    return dict(sorted(found.items()))


def tabulate(folder: Path) -> Table:
    """The table of a folder, every file read."""
    return _read(folder, entries(folder))


def row_of(path: Path) -> dict[str, Any]:
    """The row of one file, read."""
    return {"stamp": stamp(path.lstat()), "sha256": sha256(path)}


def _read(folder: Path, found: Collection[str]) -> Table:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(found, pool.map(lambda name: row_of(folder / name), found), strict=True))


def compare(
    folder: Path, table: Mapping[str, Mapping[str, Any]], *, contents: bool = False, skip: Iterable[str] = ()
) -> tuple[list[str], Table]:
    """Names of files that were changed, added or removed, and the table with the stamps that unchanged ones have now.

    Args:
        table: as it was; rows without a stamp that counts are compared by contents.
        contents: read every file. skip: names that do not count.
    """
    found = {name: info for name, info in entries(folder).items() if name not in set(skip)}
    changed = found.keys() ^ table.keys()
    changed |= {name for name, info in found.items() if not _is_plain(info)}
    same = {
        name for name in found.keys() & table.keys() if not contents and table[name].get("stamp") == stamp(found[name])
    }
    read = _read(folder, found.keys() - changed - same)
    changed |= {name for name, row in read.items() if row["sha256"] != table[name]["sha256"]}
    now = {name: read.get(name) or dict(table[name]) for name in found if name not in changed}
    return sorted(changed), now


def restamped(folder: Path, table: Mapping[str, Mapping[str, Any]]) -> Table:
    """The table, with the last times of files whose links alone have changed: this process has just made or removed some."""
    found = entries(folder)
    now = {name: stamp(found[name]) if name in found else None for name in table}
    touched = {n for n, row in table.items() if now[n] is not None and now[n][:-1] == row["stamp"][:-1]}  # type: ignore[index]
    return {name: {**row, "stamp": now[name]} if name in touched else dict(row) for name, row in table.items()}


def _is_plain(info: os.stat_result) -> bool:
    return S_ISREG(info.st_mode)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; hard links to the same file count once."""
    return sum({info.st_ino: info.st_size for info in entries(folder).values() if _is_plain(info)}.values())
