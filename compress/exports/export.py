"""Plan and write an export. The path appears in one step, whole."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import OutputError
from compress.exports.base import ExportPlan
from compress.exports.table import get
from compress.files import aside, disk_errors, remove, remove_leftovers
from compress.settings import Settings

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.progress import Progress


def planned(checkpoint: Checkpoint, to: str, settings: Settings) -> ExportPlan:
    """The plan of an export. Raises `ExportError` where the target cannot hold the checkpoint or a package is missing."""
    target = get(to)
    target.require()
    assert checkpoint.folder is not None
    return target.plan(checkpoint.spec, checkpoint.folder, settings)


def check_path(path: Path) -> None:
    """Raise `OutputError` where something is at the path already."""
    if os.path.lexists(path):
        raise OutputError("exists already", where=str(path), fix="name another output, or remove it")


def export(
    checkpoint: Checkpoint, to: str, path: Path, settings: Settings, progress: Progress, *, replace: bool = False
) -> ExportPlan:
    """Write an export to ``path``.

    Args:
        to: name of the target. settings: of that target. replace: replace an earlier export at ``path``.

    Raises:
        ExportError: the target cannot hold the checkpoint, or a package is missing. OutputError: ``path`` exists.
    """
    plan = planned(checkpoint, to, settings)
    if not replace:
        check_path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        made = aside(path)
        try:
            get(to).write(checkpoint, made, settings, progress)
            if replace:
                remove(path)
            made.rename(path)
        finally:
            with contextlib.suppress(OSError):
                remove(made)
    return plan
