"""The run folder ``<output>.run``: its lock, its finished stages, its cached measurements."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import OutputError
from compress.files import disk_errors
from compress.pipeline.fingerprint import write_atomically


@dataclass(frozen=True)
class RunFolder:
    """Paths below a run folder. ``stages/<key>`` holds a checkpoint, ``stages/<key>.json`` what is known of it."""

    path: Path

    @property
    def stages(self) -> Path:
        """Finished stages."""
        return self.path / "stages"

    @property
    def report(self) -> Path:
        """The last report."""
        return self.path / "report.json"

    def work(self, key: str) -> Path:
        """Durable scratch space of a stage."""
        return self.path / "work" / key

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder. Raises `OutputError` where another process does."""
        with disk_errors(self.path):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError as error:  # a file system that takes no folders, such as /proc
                raise OutputError(f"cannot be made: {error.strerror}", where=str(self.path)) from None
            lock = (self.path / "lock").open("a+")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise OutputError(
                    f"another run is working on this output (process {holder})",
                    where=str(self.path),
                    fix="wait for it, or stop it",
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            self._sweep()
            yield

    def _sweep(self) -> None:
        """Remove what a killed run left half-written."""
        for leftover in (*self.path.glob(".*.tmp*"), *self.stages.glob(".*.tmp*")):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        if self.stages.is_dir():
            for folder in self.stages.iterdir():
                if folder.is_dir() and not folder.with_name(folder.name + ".json").exists():
                    shutil.rmtree(folder, ignore_errors=True)

    def find(self, key: str) -> dict[str, Any] | None:
        """What is known of a finished stage, None where there is none or its files have changed since."""
        try:
            data: dict[str, Any] = json.loads((self.stages / f"{key}.json").read_text())
        except (OSError, ValueError):
            return None
        return data if data.get("files") == stamps(self.stages / key) else None

    def drop(self, key: str) -> None:
        """Forget a stage."""
        (self.stages / f"{key}.json").unlink(missing_ok=True)
        shutil.rmtree(self.stages / key, ignore_errors=True)

    def finish(self, key: str, data: dict[str, Any]) -> dict[str, Any]:
        """Record a stage whose folder is complete; from now on it is found."""
        data = {**data, "files": stamps(self.stages / key)}
        write_atomically(self.stages / f"{key}.json", json.dumps(data, indent=1).encode())
        return data

    def cached(self, name: str) -> dict[str, Any] | None:
        """A cached measurement."""
        try:
            data: dict[str, Any] = json.loads((self.path / "measurements" / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None
        return data

    def cache(self, name: str, data: dict[str, Any]) -> None:
        """Keep a measurement."""
        (self.path / "measurements").mkdir(exist_ok=True)
        write_atomically(self.path / "measurements" / f"{name}.json", json.dumps(data).encode())

    def finished(self) -> list[str]:
        """Keys of all finished stages, oldest first."""
        found = sorted(self.stages.glob("*.json"), key=lambda p: p.stat().st_mtime_ns) if self.stages.is_dir() else []
        return [p.stem for p in found]


def stamps(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of every file below a folder."""
    result = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file():
            info = path.stat()
            result[str(path.relative_to(folder))] = [info.st_size, info.st_mtime_ns]
    return result


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; hard links to the same file count once."""
    seen = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            info = path.stat()
            seen[info.st_ino] = info.st_size
    return sum(seen.values())
