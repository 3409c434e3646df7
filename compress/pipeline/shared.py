"""Finished work that several run folders share: stages by their keys, measurements by their names.

A run takes what is there and puts there what it computes. Weights are hard-linked, so a stage takes its bytes once. While one
run computes a stage, others that need it wait: a lock of the operating system says so, which ends with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import OutputError
from compress.files import disk_errors, link_tree, place, remove, temporary
from compress.pipeline.contents import folder_bytes

if TYPE_CHECKING:
    from compress.progress import Progress


@dataclass(frozen=True)
class SharedWork:
    """A folder of finished work. ``stages/<key>`` and ``stages/<key>.json`` are as in a run folder."""

    path: Path

    @classmethod
    def at(cls, path: Path) -> SharedWork:
        """The shared work in a folder, which is made where it is missing. Raises `OutputError` where it cannot be one."""
        path = place(path)
        with disk_errors(path):
            if path.exists() and not path.is_dir():
                raise OutputError("is not a folder", where=str(path), fix="name another one")
            for part in ("stages", "measurements", "locks"):
                (path / part).mkdir(parents=True, exist_ok=True)
        return cls(path)

    @property
    def stages(self) -> Path:
        """Finished stages."""
        return self.path / "stages"

    @property
    def measurements(self) -> Path:
        """Measurements, as files of records."""
        return self.path / "measurements"

    @contextlib.contextmanager
    def claimed(self, name: str, progress: Progress | None = None) -> Iterator[None]:
        """Hold the lock of a stage or a measurement; wait while another process holds it."""
        lock = os.open(self.path / "locks" / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if progress is not None:
                    progress.message(f"{name}: another run computes it; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def bring(self, key: str, stages: Path) -> bool:
        """Put a stage into the stages of a run folder, if it is here. Returns whether it was."""
        return _carry(key, self.stages, stages)

    def keep(self, key: str, stages: Path) -> None:
        """Put a finished stage of a run folder here."""
        if not (self.stages / f"{key}.json").exists():
            _carry(key, stages, self.stages)

    def cached(self, name: str, measurements: Path, compute: Callable[[], Any]) -> Any:
        """The value of a measurement that ``compute`` keeps as ``measurements/<name>.json``; taken from here where it is here.

        Args:
            compute: returns the value that is kept there, and measures it where none is kept.
        """
        mine, shared = (each / f"{name}.json" for each in (measurements, self.measurements))
        with self.claimed(name):
            if shared.exists() and not mine.exists():
                measurements.mkdir(parents=True, exist_ok=True)
                _copy(shared, mine)
            value = compute()
            if mine.exists() and not shared.exists():
                _copy(mine, shared)
        return value

    def drop(self, key: str) -> None:
        """Remove a stage, unless a run takes it at this moment."""
        with contextlib.suppress(BlockingIOError), _try_lock(self.path / "locks" / key):
            for path in (self.stages / f"{key}.json", self.stages / key, *_measured(key, self.stages)):
                remove(path)

    def limit(self, most: int) -> None:
        """Remove stages, those that were longest unused first, until the rest has at most so many bytes."""
        kept = sorted(self.stages.glob("[!.]*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        used = 0
        for record in kept:
            used += folder_bytes(record.with_suffix(""))
            if used > most:
                self.drop(record.stem)


def _carry(key: str, source: Path, target: Path) -> bool:
    """Link a stage's folder, copy its record and what it measured; a stage without a record is not finished."""
    record = source / f"{key}.json"
    if not record.is_file() or not (source / key).is_dir():
        return False
    target.mkdir(parents=True, exist_ok=True)
    remove(target / f"{key}.json")
    remove(target / key)
    try:
        with temporary(target / key) as temp:
            link_tree(source / key, temp)
            temp.rename(target / key)
        for path in [*_measured(key, source), record]:
            _copy(path, target / path.name)
    except FileNotFoundError:  # it was dropped meanwhile
        return False
    with contextlib.suppress(FileNotFoundError):
        os.utime(record)  # it was used now
    return True


def _measured(key: str, stages: Path) -> list[Path]:
    """Files of tensors that a stage measured."""
    return sorted(stages.glob(f"{key}.*.safetensors"))


def _copy(source: Path, target: Path) -> None:
    with temporary(target) as temp:
        shutil.copyfile(source, temp / "file")
        (temp / "file").replace(target)


@contextlib.contextmanager
def _try_lock(path: Path) -> Iterator[None]:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)
