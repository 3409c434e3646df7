"""The output folder: what may be there, and how a result gets there in one step."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import OutputError
from compress.files import disk_errors

PROVENANCE = "compress.json"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """``compress.json`` of a checkpoint that a run of ours published, None for anything else."""
    try:
        data = json.loads((folder / PROVENANCE).read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and data.get("schema") == "compress.checkpoint/1" else None


def check_output(output: Path, model: Path | None, what: str = "model") -> None:
    """The output may be absent, empty, or a result of ours that nobody has changed. Raises `OutputError` for all else.

    Args:
        model: a folder that is read, and ``what`` it is: the output is neither it, nor inside it, nor around it.
    """
    with disk_errors(output):
        _check_output(output, model, what)


def _check_output(output: Path, model: Path | None, what: str) -> None:
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
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError("exists and is not a folder", where=str(output), fix="name another output")
    if not any(output.iterdir()):
        return
    provenance = read_provenance(output)
    if provenance is None:
        raise OutputError(
            "exists and is not a result of this tool", where=str(output), fix="name another output, or remove it"
        )
    if changed := changed_files(output, provenance):
        raise OutputError(
            f"{changed[0]} was changed or added since it was published",
            where=str(output),
            fix="move the folder away, or remove it",
        )


def changed_files(output: Path, provenance: Mapping[str, Any]) -> list[str]:
    """Files whose size differs from what was published, that are missing, or that were added."""
    recorded = dict(provenance.get("files", {}))
    present = {
        str(p.relative_to(output)): p.stat().st_size for p in output.rglob("*") if p.is_file() and p.name != PROVENANCE
    }
    return sorted(name for name in recorded.keys() | present.keys() if recorded.get(name) != present.get(name))


def publish(stage: Path, output: Path, provenance: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Put the stage's files, and ``files`` beside them, at ``output`` in one step; an earlier result is exchanged for it.

    Weights are hard-linked where the file system can, copied elsewhere.
    """
    temp = output.parent / f".{output.name}.tmp-{os.getpid()}"
    with disk_errors(output):
        shutil.rmtree(temp, ignore_errors=True)
        try:
            shutil.copytree(stage, temp, copy_function=_link)
            for name, data in files.items():
                (temp / name).unlink(missing_ok=True)  # it may be a link to the stage's own file
                (temp / name).write_bytes(data)
            sizes = {str(p.relative_to(temp)): p.stat().st_size for p in sorted(temp.rglob("*")) if p.is_file()}
            (temp / PROVENANCE).write_text(json.dumps({**provenance, "files": sizes}, indent=1, sort_keys=True) + "\n")
            if not output.exists():
                temp.rename(output)
            elif not any(output.iterdir()):
                output.rmdir()
                temp.rename(output)
            else:
                _exchange(temp, output)
        finally:
            shutil.rmtree(temp, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders; with renameat2(2) in one step, elsewhere in two renames."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
    except (OSError, AttributeError):
        pass
    aside = old.parent / f".{old.name}.old-{os.getpid()}"
    old.rename(aside)
    new.rename(old)
    aside.rename(new)
