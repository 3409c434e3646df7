"""The run folder ``<output>.run``: its lock, its finished stages, its cached measurements.

Every file may be damaged: records are read by `files.read_record`, which treats a damaged record as absent. No link out of the
folder is followed. Files are removed under the lock only, and renamed first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any

from compress.errors import OutputError
from compress.files import disk_errors, place, read_json, read_record, remove, write_record
from compress.pipeline.contents import compare, entries, restamped, tabulate
from compress.pipeline.shared import SharedWork
from compress.workspace import Workspace

if TYPE_CHECKING:
    from compress.progress import Progress

_STAGE, _MEASUREMENT, _PUBLISHED, _CURRENT = (
    f"compress.{name}/2" for name in ("stage", "measurement", "published", "current")
)


#: End of the name of `RunFolder.inputs`.
_INPUTS = ".inputs.safetensors"


@dataclass(frozen=True)
class RunFolder:
    """Paths below a run folder. ``stages/<key>`` holds a checkpoint, ``stages/<key>.json`` the record of its stage.

    ``read``: names of the measurements that this process used. ``shared``: work that other run folders have too.
    """

    path: Path
    read: set[str] = field(default_factory=set, compare=False)
    shared: SharedWork | None = None

    @classmethod
    def of(cls, output: Path, shared: SharedWork | None = None) -> RunFolder:
        """The run folder of an output. Raises `OutputError` where the output names no folder."""
        output = place(output)
        return cls(output.with_name(f"{output.name}.run"), shared=shared)

    def hashes(self, name: str = "inputs") -> Path:
        """The file of known hashes of a checkpoint that runs read."""
        return (self.path if self.shared is None else self.shared.path) / f"{name}.json"

    @property
    def stages(self) -> Path:
        """Finished stages."""
        return self.path / "stages"

    @property
    def measurements(self) -> Path:
        """Cached measurements."""
        return self.path / "measurements"

    @property
    def report(self) -> Path:
        """The last report."""
        return self.path / "report.json"

    @property
    def works(self) -> Path:
        """Workspaces of unfinished stages."""
        return self.path / "work"

    def work(self, key: str) -> Path:
        """Folder of a stage's workspace (`compress.workspace`)."""
        return self.works / key

    def inputs(self, key: str) -> Path:
        """File of the mean squares of matrices' inputs that a stage measured (`compress.blockwise.input_squares`)."""
        return self.stages / f"{key}{_INPUTS}"

    @contextlib.contextmanager
    def locked(self, *, remove_leftovers: bool = True) -> Iterator[None]:
        """Hold the lock of the run folder, and remove the leftovers of killed runs (``remove_leftovers``).

        Raises:
            OutputError: another process holds it, or a link in it leads elsewhere.
        """
        with disk_errors(self.path):
            self._check()
            lock = self._lock()
            try:
                os.ftruncate(lock, 0)
                os.pwrite(lock, str(os.getpid()).encode(), 0)
                for leftover in self.leftovers() if remove_leftovers else ():
                    remove(leftover)
            except BaseException:
                os.close(lock)
                raise
        try:
            yield
        finally:
            os.close(lock)

    def check_idle(self) -> None:
        """Check that no run is at work here, without changing anything. Raises `OutputError` as `locked` does."""
        with disk_errors(self.path):
            self._check()
            path = self.path / "lock"
            lock = os.open(path if path.is_file() else self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._hold(lock)
            os.close(lock)

    def _check(self) -> None:
        """Check that the path is a folder without links, which would make a run read, write and remove elsewhere."""
        if self.path.is_symlink():
            raise OutputError("is a symbolic link", where=str(self.path), fix="remove the link, or name another output")
        if self.path.exists() and not self.path.is_dir():
            raise OutputError("is not a folder", where=str(self.path), fix="move it away, or name another output")
        for root, folders, files in os.walk(self.path):
            for name in (*folders, *files):
                if (path := Path(root) / name).is_symlink():
                    raise OutputError(
                        "is a symbolic link, which a run never makes",
                        where=str(path),
                        fix="remove it, or the run folder",
                    )

        if self.path.exists() and not self.is_ours() and any(self.path.iterdir()):
            raise OutputError(
                "exists and is not a run folder", where=str(self.path), fix="move it away, or name another output"
            )

    def is_ours(self) -> bool:
        """Whether a run has worked here, by its lock, or by any record where somebody removed the lock."""
        lock = self.path / "lock"
        with contextlib.suppress(OSError):
            if (
                S_ISREG(lock.lstat().st_mode)
                and lock.stat().st_size < 20
                and not lock.read_bytes().strip(b"0123456789")
            ):
                return True
        records = (p for part in (self.path, self.stages, self.measurements) for p in sorted(part.glob("*.json")))
        return any(
            isinstance(d := read_json(p), dict) and str(d.get("schema")).startswith("compress.") for p in records
        )

    def _lock(self) -> int:
        """Lock the run folder. Returns the descriptor that holds the lock."""
        path = self.path / "lock"
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError as error:  # a file system without new folders, such as /proc
                raise OutputError(f"cannot be made: {error.strerror}", where=str(self.path)) from None
            for part in (self.stages, self.works, self.measurements):
                if part.exists() and not part.is_dir():
                    remove(part)
            if path.is_dir() or (path.exists() and path.stat().st_nlink > 1):  # not ours: nothing is written there
                remove(path)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
            if not S_ISREG(os.fstat(lock).st_mode):
                os.close(lock)
                remove(path)
                continue
            self._hold(lock)
            try:  # it may have been removed, with the whole folder, before it was held
                if os.path.samestat(os.fstat(lock), path.stat()):
                    return lock
            except FileNotFoundError:
                pass
            os.close(lock)

    def _hold(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise OutputError(
                f"another run is working on this output (process {holder})",
                where=str(self.path),
                fix="wait for it, or stop it",
            ) from None
        except BaseException:
            os.close(lock)
            raise

    def leftovers(self) -> list[Path]:
        """Paths that killed runs left half-written, half-removed or no longer needed; valid while no run is at work here."""
        parts = (self.path, self.stages, self.measurements, self.works)
        paths = [path for part in parts for path in sorted(part.glob(".*.tmp*"))]
        for path in sorted(self.stages.glob("[!.]*")):
            if path.is_dir() and path.suffix != ".json" and not path.with_name(f"{path.name}.json").exists():
                paths.append(path)
        for path in sorted(self.stages.glob(f"[!.]*{_INPUTS}")):
            if not path.with_name(f"{path.name.removesuffix(_INPUTS)}.json").exists():
                paths.append(path)
        for path in sorted(self.works.glob("[!.]*")):
            if self._record(path.name) is not None and (self.stages / path.name).is_dir():
                paths.append(path)
        return paths

    def _record(self, key: str) -> dict[str, Any] | None:
        return read_record(self.stages / f"{key}.json", _STAGE)

    def find(self, key: str, *, contents: bool = False) -> dict[str, Any] | None:
        """The record of a finished stage; None where there is none or its files have changed since.

        ``contents``: read and compare every file, since its bytes are about to be used.
        """
        data = self._record(key)
        if data is None or not (self.stages / key).is_dir():
            return None
        changed, files = compare(self.stages / key, data["files"], contents=contents)
        if changed:
            return None
        if files != data["files"]:
            data["files"] = files
            write_record(self.stages / f"{key}.json", _STAGE, data)
        return data

    def restamp(self, key: str) -> None:
        """Update the stamps of a stage whose files this process has just linked; their contents have not changed."""
        if (data := self._record(key)) is not None:
            data["files"] = restamped(self.stages / key, data["files"])
            write_record(self.stages / f"{key}.json", _STAGE, data)

    def drop(self, key: str) -> None:
        """Remove a stage."""
        remove(self.stages / f"{key}.json")
        remove(self.inputs(key))
        remove(self.stages / key)

    def set_aside(self, key: str) -> Path:
        """Rename a stage's workspace to a name that no run reads; `clean` removes it. Returns the new path."""
        aside = self.works / f"{key}.unusable"
        remove(aside)
        return self.work(key).rename(aside)

    def finish(self, key: str, data: dict[str, Any]) -> dict[str, Any]:
        """Record a stage whose folder is complete; `find` returns it from now on."""
        data = {**data, "files": tabulate(self.stages / key)}
        write_record(self.stages / f"{key}.json", _STAGE, data)
        return data

    def cached(self, name: str, compute: Callable[[], dict[str, Any]], *, fresh: bool = False) -> dict[str, Any]:
        """The measurement ``name``: as an earlier run left it, or else from ``compute``, and kept (`Workspace.cached`)."""
        self.read.add(name)
        own = Workspace(self.measurements, kind=_MEASUREMENT)
        value: dict[str, Any]
        if self.shared is None:
            value = own.cached(name, compute, fresh=fresh)
        else:
            value = self.shared.cached(name, self.measurements, lambda: own.cached(name, compute))
        return value

    @contextlib.contextmanager
    def claimed(self, key: str, progress: Progress) -> Iterator[dict[str, Any] | None]:
        """Context in which a missing stage is computed here alone. Its record, where another run has just computed it."""
        if self.shared is None:
            yield None
            return
        with self.shared.claimed(key, progress):
            record = self.find(key, contents=True) if self.shared.bring(key, self.stages) else None
            yield record
            if record is None:
                self.shared.keep(key, self.stages)

    def bring(self, keys: Iterable[str]) -> None:
        """Take the stages that are shared and missing here."""
        for key in keys if self.shared is not None else ():
            assert self.shared is not None
            if self._record(key) is None and (self.shared.stages / f"{key}.json").exists():
                with self.shared.claimed(key):
                    self.shared.bring(key, self.stages)

    def published(self) -> dict[str, Any]:
        """``recipe``, ``report`` (SHA-256) and ``files`` of the last published result; empty where unknown."""
        return read_record(self.path / "published.json", _PUBLISHED) or {}

    def set_published(self, data: dict[str, Any]) -> None:
        """Record the published result."""
        write_record(self.path / "published.json", _PUBLISHED, data)

    def current(self) -> dict[str, Any]:
        """``stages`` of the last run that began and, once it is done, its ``measurements``; empty where unknown."""
        return read_record(self.path / "current.json", _CURRENT) or {}

    def set_current(self, stages: list[str], *, done: bool = False) -> None:
        """Record the stages of a run, and when it is done the measurements that it used."""
        write_record(
            self.path / "current.json",
            _CURRENT,
            {"stages": stages, "measurements": sorted(self.read) if done else None},
        )

    def finished(self) -> list[str]:
        """Keys of all finished stages, oldest first."""
        if not self.stages.is_dir():
            return []
        records = {n: info for n, info in entries(self.stages).items() if "/" not in n and n.endswith(".json")}
        return [
            n.removesuffix(".json")
            for n in sorted(records, key=lambda n: records[n].st_mtime_ns)
            if not n.startswith(".")
        ]
