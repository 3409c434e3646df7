"""Lists run folders, and removes their unused parts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError, OutputError
from compress.files import expanded, leftovers, remove
from compress.pipeline.contents import PROVENANCE, folder_bytes
from compress.pipeline.folder import RunFolder

_SKIPPED = frozenset({".git", ".venv", "node_modules", "__pycache__"})


@dataclass(frozen=True)
class Unused:
    """Something that no run needs: its name for people, and the paths to remove."""

    name: str
    paths: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Bytes on disk; hard links count once."""
        return sum(folder_bytes(path) if path.is_dir() else path.lstat().st_size for path in self.paths)


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """Run folders below ``folder``, each with its stages, bytes on disk, the verdict of its last report, and leftovers.

    Leftovers of dead processes beside outputs without a run folder have a row of their own, without stages.
    """
    rows, named = [], set[Path]()
    for root, folders, _ in os.walk(folder):
        for name in sorted(folders):
            path = Path(root) / name
            if name.endswith(".run") and RunFolder(path).is_ours():
                rows.append(_describe(path))
                named |= set(leftovers(path.parent, path.name.removesuffix(".run")))
        for path in leftovers(Path(root)):
            if path not in named and path.is_dir():
                size = folder_bytes(path)
                row: dict[str, Any] = {"run": str(path), "output": None, "status": None, "bytes": size, "stages": []}
                rows.append({**row, "leftovers": [{"name": path.name, "bytes": size}]})
        folders[:] = sorted(f for f in folders if not f.endswith(".run") and f not in _SKIPPED and ".tmp-" not in f)
    return rows


def _describe(path: Path) -> dict[str, Any]:
    run = RunFolder(path)
    used = _used(run)
    output = _output(run)
    try:
        run.check_idle()
        left = [u for u in _unused(run) if u.name not in run.finished()]
    except OutputError:  # a run is at work: everything is in use
        left = []
    return {
        "run": str(path),
        "output": str(output) if (output / PROVENANCE).exists() else None,
        "status": _reported(run).status,
        "bytes": folder_bytes(path),
        "stages": [
            {"name": key, "bytes": folder_bytes(run.stages / key), "used": key in used} for key in run.finished()
        ],
        "leftovers": [{"name": u.name, "bytes": u.bytes} for u in left],
    }


def _output(run: RunFolder) -> Path:
    return run.path.with_name(run.path.name.removesuffix(".run"))


@dataclass(frozen=True)
class _Reported:
    """The verdict of a run's last report, and the names of the stages in it; None and none where it cannot be read."""

    status: str | None = None
    stages: frozenset[str] = frozenset()


def _reported(run: RunFolder) -> _Reported:
    try:
        report = json.loads(run.report.read_text(encoding="utf-8"))
        stages = frozenset(Path(stage["folder"]).name for stage in report["stages"])
        return _Reported(str(report["status"]), stages)
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return _Reported()


def _used(run: RunFolder) -> set[str]:
    """Keys of the stages of the last report and of the last run."""
    return set(_reported(run).stages) | set(run.current().get("stages", ()))


def _unused(run: RunFolder) -> list[Unused]:
    """Stages, workspaces and measurements that the last run does not use, and leftovers of dead processes."""
    used, current = _used(run), run.current()
    left = run.leftovers()
    unused = [Unused(key, _of_stage(run, key)) for key in run.finished() if key not in used]
    if run.works.is_dir():
        works = (path for path in sorted(run.works.iterdir()) if path.name not in used and path not in left)
        unused += [Unused(f"work/{path.name}", (path,)) for path in works]
    if current.get("measurements") is not None and run.measurements.is_dir():
        old = [p for p in sorted(run.measurements.glob("*.json")) if p.stem not in current["measurements"]]
        if old:
            unused.append(Unused(f"{len(old)} old measurement{'s' if len(old) > 1 else ''}", tuple(old)))
    left += leftovers(run.path.parent, _output(run).name)
    return unused + [Unused(path.name, (path,)) for path in left]


def _of_stage(run: RunFolder, key: str) -> tuple[Path, ...]:
    """The paths of a stage."""
    inputs = run.inputs(key)
    return (run.stages / key, run.stages / f"{key}.json", *([inputs] if inputs.exists() else []))


def clean(path: Path, *, everything: bool = False, dry_run: bool = False) -> tuple[list[str], int]:
    """Remove the unused parts of a run folder, or all of it. Returns the names removed and their bytes.

    Args:
        path: the run folder, its output, or a leftover of a dead process (``.NAME.tmp-…``).
        everything: the whole folder. dry_run: change nothing.

    Raises:
        CompressError: it is not a run folder, or a run is at work there.
    """
    path = expanded(path)
    if path.name in ("", ".."):
        raise CompressError("names no run folder", where=str(path), fix="`compress runs` lists them")
    if ".." in path.parts:  # as a run resolves it: the parent of the folder that a link leads to
        path = path.parent.resolve() / path.name
    if path in (orphans := leftovers(path.parent)):
        return _gone([Unused(str(path), (path,))], dry_run)
    run = RunFolder(path if path.name.endswith(".run") else path.with_name(f"{path.name}.run"))
    if not run.path.is_dir() or not (run.path.is_symlink() or run.is_ours()):
        beside = [p for p in leftovers(path.parent, path.name) if p in orphans]
        if not beside:
            raise CompressError("is not a run folder", where=str(run.path), fix="`compress runs` lists them")
        return _gone([Unused(p.name, (p,)) for p in beside], dry_run)

    def unused() -> list[Unused]:
        if not everything:
            return _unused(run)
        beside = leftovers(run.path.parent, _output(run).name)
        return [Unused(str(run.path), (run.path,)), *(Unused(p.name, (p,)) for p in beside)]

    if dry_run:
        run.check_idle()
        return _gone(unused(), dry_run)
    with run.locked(remove_leftovers=False):
        return _gone(unused(), dry_run)


def _gone(unused: list[Unused], dry_run: bool) -> tuple[list[str], int]:
    freed = sum(u.bytes for u in unused)
    for path in () if dry_run else (path for u in unused for path in reversed(u.paths)):
        remove(path)  # a stage's record first
    return [u.name for u in unused], freed
