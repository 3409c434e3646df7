"""Run folders: what is there, and what can go."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from compress.errors import CompressError, ReportError
from compress.pipeline.folder import RunFolder, folder_bytes
from compress.pipeline.publish import PROVENANCE

_SKIPPED = frozenset({".git", ".venv", "node_modules", "__pycache__"})


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """Run folders below ``folder``, each with its stages, bytes on disk and the verdict of its last report."""
    found = []
    for root, folders, _ in os.walk(folder):
        for name in sorted(folders):
            path = Path(root) / name
            if name.endswith(".run") and ((path / "stages").is_dir() or (path / "report.json").exists()):
                found.append(_describe(path))
        folders[:] = sorted(f for f in folders if not f.endswith(".run") and f not in _SKIPPED)
    return found


def _describe(path: Path) -> dict[str, Any]:
    run = RunFolder(path)
    used = _used(run)
    output = path.parent / path.name.removesuffix(".run")
    return {
        "run": str(path),
        "output": str(output) if (output / PROVENANCE).exists() else None,
        "status": _report(run).get("status"),
        "bytes": folder_bytes(path),
        "stages": [
            {"name": key, "bytes": folder_bytes(run.stages / key), "used": key in used} for key in run.finished()
        ],
    }


def _report(run: RunFolder) -> dict[str, Any]:
    from compress import report as reports

    try:
        return reports.load(run.report)
    except ReportError:
        return {}


def _used(run: RunFolder) -> set[str]:
    """Keys of the stages that the last report stands on."""
    return {Path(stage["folder"]).name for stage in _report(run).get("stages", ())}


def clean(path: Path, *, everything: bool = False, dry_run: bool = False) -> tuple[list[str], int]:
    """Remove unused stages of a run folder, or all of it. Returns the names removed and the bytes that they held.

    Raises:
        CompressError: it is no run folder, or a run is at work there.
    """
    path = path.parent / path.name.rstrip("/")
    run = RunFolder(path if path.name.endswith(".run") else path.parent / f"{path.name}.run")
    if not run.path.is_dir() or not ((run.path / "stages").exists() or run.report.exists()):
        raise CompressError("is no run folder", where=str(run.path), fix="`compress runs` lists them")
    with run.locked():
        used = _used(run)
        names = run.finished() if everything else [key for key in run.finished() if key not in used]
        freed = folder_bytes(run.path) if everything else sum(folder_bytes(run.stages / name) for name in names)
        if not dry_run:
            for name in names:
                run.drop(name)
            if everything:
                shutil.rmtree(run.path)
    return ([str(run.path)] if everything else names), freed
