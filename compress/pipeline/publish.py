"""Publication: checks the output folder, and puts a result there in one step."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError, OutputError
from compress.files import SIZE, disk_errors, link_tree, read_json, remove, temporary, write_atomically
from compress.pipeline.contents import PROVENANCE, Table, compare, restamped, row_of
from compress.pipeline.fingerprint import fingerprint

_SCHEMA = "compress.checkpoint/2"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MOVE = "move the folder away, or remove it"


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """``compress.json`` of a checkpoint that a run published; None for anything else.

    ``files`` has ``bytes`` and ``sha256`` of each file except this one. It is absent where this file was changed since, and
    in files of earlier versions.
    """
    data = read_json(folder / PROVENANCE)
    if not isinstance(data, dict) or data.get("schema") not in ("compress.checkpoint/1", _SCHEMA):
        return None
    rest = {key: value for key, value in data.items() if key != "sha256"}
    try:
        whole = data["schema"] == _SCHEMA and data.get("sha256") == fingerprint(rest)
    except RecursionError:
        whole = False
    if not whole:
        rest.pop("files", None)
    return rest


def check_place(output: Path, model: Path | None, what: str = "model") -> None:
    """Check that the output can be written. Raises `OutputError`.

    Args:
        model: a folder that the run reads: the output must be neither this folder, nor inside it, nor around it.
        what: a word for that folder.
    """
    with disk_errors(output):
        _check_place(output, model, what)


def _check_place(output: Path, model: Path | None, what: str) -> None:
    if model is not None and model.exists():
        inside, outside = output.resolve(), model.resolve()
        if inside == outside:
            raise OutputError(f"output and {what} are the same folder", where=str(output), fix="name another output")
        if inside.is_relative_to(outside):
            raise OutputError(
                f"the output lies inside the {what}'s folder", where=str(output), fix="name another output"
            )
        if outside.is_relative_to(inside):
            raise OutputError(
                f"the {what} lies inside the output's folder", where=str(output), fix="name another output"
            )
    for parent in output.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise OutputError(f"{parent} is not a folder", where=str(output))
            if not os.access(parent, os.W_OK | os.X_OK):
                raise OutputError(
                    f"{parent} is not writable", where=str(output), fix="name another output, or change its permissions"
                )
            break
    if output.is_symlink():
        raise OutputError("is a symbolic link", where=str(output), fix="name a folder of its own")
    if output.exists() and not output.is_dir():
        raise OutputError("exists and is not a folder", where=str(output), fix="name another output")
    if output.is_mount():
        raise OutputError(
            "is a mount point, where no finished folder can be put in one step",
            where=str(output),
            fix="name a folder inside it",
        )


def check_absent(output: Path, model: Path | None) -> None:
    """Check that the output does not exist and can be written. Raises `OutputError`."""
    check_place(output, model)
    if output.exists():
        raise OutputError("exists already", where=str(output), fix="name another output, or remove it")


def check_output(output: Path, model: Path | None, known: Mapping[str, Any] | None = None) -> Table:
    """Check that the output is absent, empty, or an unchanged result of a run. Raises `OutputError` for anything else.

    Args:
        known: ``stamp`` and ``sha256`` of the files that were published there; files with the same stamp are not read.

    Returns:
        The table of such a result, with present stamps.
    """
    check_place(output, model)
    with disk_errors(output):
        return _unchanged(output, known or {})


def _unchanged(output: Path, known: Mapping[str, Any], *, contents: bool = False) -> Table:
    if not output.exists() or not any(output.iterdir()):
        return {}
    provenance = read_provenance(output)
    if provenance is None:
        raise OutputError(
            "exists and is not a result of this tool", where=str(output), fix="name another output, or remove it"
        )
    if "files" not in provenance:
        raise OutputError(
            f"{PROVENANCE} was changed since it was published, or comes from a version without digests",
            where=str(output),
            fix=_MOVE,
        )
    table = {name: {"sha256": row["sha256"]} for name, row in provenance["files"].items()}
    table |= {name: row for name, row in known.items() if row["sha256"] == table.get(name, {}).get("sha256")}
    changed, now = compare(output, table, contents=contents, skip=(PROVENANCE,))
    if changed:
        raise OutputError(f"{changed[0]} was changed or added since it was published", where=str(output), fix=_MOVE)
    return now


def recover(output: Path) -> None:
    """Put back an earlier result that a killed run left aside, between the two renames of an exchange."""
    aside = _old(output)
    with disk_errors(output):
        if aside.is_symlink() or not aside.is_dir() or read_provenance(aside) is None:  # it may be somebody else's
            return
        if not os.path.lexists(output):
            aside.rename(output)
        elif read_provenance(output) is not None:
            remove(aside)


def publish(
    stage: Path,
    files: Mapping[str, Any],
    output: Path,
    provenance: Mapping[str, Any],
    more: Mapping[str, bytes],
) -> tuple[Table, Path | None]:
    """Put the stage's files, and ``more`` beside them, at ``output`` in one step; an earlier result is replaced.

    Weights are hard-linked where the file system allows it, and copied elsewhere. Every byte is read before it is published
    or replaced.

    Args:
        files: the stage's table, as it was written. more: contents of further files.

    Returns:
        The output's table; and the folder that keeps the earlier result, where somebody changed it at the last moment.

    Raises:
        CheckpointError: the stage's files have changed since they were written. OutputError: the output is somebody else's.
    """
    with temporary(output) as temp:
        link_tree(stage, temp)
        changed, table = compare(temp, files, contents=True)
        if changed:
            raise CheckpointError(
                f"{changed[0]} is not what was written",
                where=str(stage),
                fix="check the disk; run again to make it anew",
            )
        for name, data in more.items():
            table[name] = _replace(temp / name, data)  # it may be a link to the stage's own file
        rows = {n: {"bytes": row["stamp"][SIZE], "sha256": row["sha256"]} for n, row in sorted(table.items())}
        values = {**provenance, "schema": _SCHEMA, "files": rows}
        text = json.dumps({**values, "sha256": fingerprint(values)}, indent=1, sort_keys=True) + "\n"
        table[PROVENANCE] = _replace(temp / PROVENANCE, text.encode())
        kept = None
        if not output.exists():
            temp.rename(output)
        else:
            check_place(output, None)
            old = _unchanged(output, {}, contents=True)
            _exchange(temp, output)
            if old and compare(temp, old, skip=(PROVENANCE,))[0]:
                kept = _free(output)
                temp.rename(kept)
    return restamped(output, table), kept


def _replace(path: Path, data: bytes) -> dict[str, Any]:
    write_atomically(path, data)
    return row_of(path)


def _free(output: Path) -> Path:
    """An unused name beside the output."""
    number = 1
    while os.path.lexists(path := output.with_name(f"{output.name}.changed-{number}")):
        number += 1
    return path


def _old(output: Path) -> Path:
    return output.with_name(f".{output.name}.old")


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders: with renameat2(2) in one step, elsewhere in renames that `recover` can complete after a kill."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
    except (OSError, AttributeError):
        pass
    aside = _old(old)
    old.rename(aside)
    new.rename(old)
    aside.rename(new)
