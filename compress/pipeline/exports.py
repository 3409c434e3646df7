"""The exports of a recipe: planned and refused before any work, written beside the output once that is published."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.store import with_storage
from compress.errors import OutputError
from compress.exports import export, get, planned
from compress.files import disk_errors, place, read_record, write_record
from compress.formatting import format_bytes
from compress.pipeline.contents import entries

if TYPE_CHECKING:
    from compress.pipeline.state import Run
    from compress.planning import Plan
    from compress.recipe import Recipe
    from compress.recipe.export_entries import ExportEntry

_KIND = "compress.exports/1"


def export_path(output: Path, entry: ExportEntry) -> Path:
    """Where an export of a recipe is written: the output's name with the target's ending."""
    return output.with_name(f"{output.name}{get(entry.name).ending}")


def check_exports(run: Run) -> None:
    """Refuse exports that cannot be written. Raises `ExportError`, or `OutputError` where something else is in the place."""
    assert run.original.folder is not None
    for entry in run.recipe.export:
        path = export_path(run.output, entry)
        if os.path.lexists(path) and not _is_ours(run, path):
            raise OutputError("exists and is not of this run", where=str(path), fix="move it away, or remove it")
    exports_of_plan(run.recipe, run.plan, run.original.folder)


def exports_of_plan(recipe: Recipe, plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """A row for each export of a recipe: ``target``, ``path``, planned ``bytes`` and whether they are ``exact``.

    Args:
        folder: with the tokenizer.

    Raises:
        ExportError: a target cannot hold the result, or a package is missing.
    """
    if not recipe.export:
        return []
    last, rows = plan.stages[-1].passes[-1].spec, []
    spec = with_storage(last, recipe.store)
    for entry in recipe.export:
        target = get(entry.name)
        target.require()
        planned_export = target.plan(spec, folder, entry.settings)
        path = str(export_path(place(recipe.output), entry))
        exact = planned_export.exact and last.exact
        rows.append({"target": entry.name, "path": path, "bytes": planned_export.bytes, "exact": exact})
    return rows


def planned_exports(run: Run, folder: Path) -> list[dict[str, Any]]:
    """A row of the report for each export of the checkpoint in ``folder``."""
    if not run.recipe.export:
        return []
    checkpoint = open_checkpoint(folder, trust_remote_code=True)
    return [
        {
            "target": entry.name,
            "path": str(export_path(run.output, entry)),
            "bytes": planned(checkpoint, entry.name, entry.settings).bytes,
        }
        for entry in run.recipe.export
    ]


def write_exports(run: Run) -> None:
    """Write the exports of the output that are not there yet, unchanged. Raises `CompressError`."""
    for entry in run.recipe.export:
        path = export_path(run.output, entry)
        if os.path.lexists(path) and _is_ours(run, path, made_of=_marks(run.output)):
            continue
        checkpoint = open_checkpoint(run.output, trust_remote_code=True)
        plan = export(checkpoint, entry.name, path, entry.settings, run.progress, replace=True)
        row = {"marks": _marks(path), "made_of": _marks(run.output), "settings": entry.settings.model_dump(mode="json")}
        with disk_errors(run.folder.path):
            write_record(run.folder.path / "exports.json", _KIND, {**_known(run), str(path): row})
        run.progress.message(f"✓ {path}: {format_bytes(plan.bytes)}")


def _known(run: Run) -> dict[str, Any]:
    return read_record(run.folder.path / "exports.json", _KIND) or {}


def _is_ours(run: Run, path: Path, made_of: list[Any] | None = None) -> bool:
    """Whether an earlier run wrote the path, and nobody changed it; ``made_of``: and wrote it from such an output."""
    row = _known(run).get(str(path), {})
    if made_of is not None:
        settings = {str(export_path(run.output, e)): e.settings.model_dump(mode="json") for e in run.recipe.export}
        if row.get("made_of") != made_of or row.get("settings") != settings[str(path)]:
            return False
    return bool(row.get("marks") == _marks(path))


def _marks(path: Path) -> list[Any]:
    """Names, sizes and times of the files of a path, which change with them."""
    if path.is_dir():
        files = entries(path)
    else:
        files = {path.name: path.lstat()}
    return [[name, info.st_size, info.st_mtime_ns] for name, info in files.items()]
