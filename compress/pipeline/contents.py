"""Tables of a folder's files, which tell whether anybody has changed them.

A table has a row for each file: ``stamp`` (`files.stamp`) and ``sha256``. A file with the same stamp counts as unchanged; one
with another stamp is read and compared by SHA-256. All files are read before they are published or replaced.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any

from compress.files import sha256, stamp

Table = dict[str, dict[str, Any]]

#: The file of an output that says where the checkpoint comes from.
PROVENANCE = "compress.json"


def entries(folder: Path) -> dict[str, os.stat_result]:
    """All files and links below a folder, by relative path; links are not followed."""
    infos = {}
    for root, folders, files in os.walk(folder):
        links = (name for name in folders if (Path(root) / name).is_symlink())
        for name in (*files, *links):
            path = Path(root) / name
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                infos[str(path.relative_to(folder))] = path.lstat()
    return dict(sorted(infos.items()))


def tabulate(folder: Path) -> Table:
    """The table of a folder, every file read."""
    return _read(folder, entries(folder))


def row_of(path: Path) -> dict[str, Any]:
    """The row of one file, read."""
    return {"stamp": stamp(path.lstat()), "sha256": sha256(path)}


def _read(folder: Path, names: Collection[str]) -> Table:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(lambda name: row_of(folder / name), names), strict=True))


def compare(
    folder: Path, table: Mapping[str, Mapping[str, Any]], *, contents: bool = False, skip: Iterable[str] = ()
) -> tuple[list[str], Table]:
    """Names of files that were changed, added or removed, and the table of unchanged files with their present stamps.

    Args:
        table: the earlier table; rows without a valid stamp are compared by contents.
        contents: read every file. skip: names to leave out.
    """
    present = {name: info for name, info in entries(folder).items() if name not in set(skip)}
    changed = present.keys() ^ table.keys()
    changed |= {name for name, info in present.items() if not _is_plain(info)}
    same = {
        name
        for name in present.keys() & table.keys()
        if not contents and table[name].get("stamp") == stamp(present[name])
    }
    read = _read(folder, present.keys() - changed - same)
    changed |= {name for name, row in read.items() if row["sha256"] != table[name]["sha256"]}
    now = {name: read.get(name) or dict(table[name]) for name in present if name not in changed}
    return sorted(changed), now


def restamped(folder: Path, table: Mapping[str, Mapping[str, Any]]) -> Table:
    """The table with present stamps for files of which only the number of links has changed, by this process."""
    present = entries(folder)
    now = {name: stamp(present[name]) if name in present else None for name in table}
    touched = {n for n, row in table.items() if now[n] is not None and now[n][:-1] == row["stamp"][:-1]}  # type: ignore[index]
    return {name: {**row, "stamp": now[name]} if name in touched else dict(row) for name, row in table.items()}


def _is_plain(info: os.stat_result) -> bool:
    return S_ISREG(info.st_mode)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; hard links to the same file count once."""
    return sum({info.st_ino: info.st_size for info in entries(folder).values() if _is_plain(info)}.values())
