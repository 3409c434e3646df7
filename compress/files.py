"""Atomic files and folders: a path is written whole or not at all, removed in one step, and read as if it could be damaged.

While it is written or removed, a path has the name ``.NAME.tmp-PROCESS-NUMBER`` beside its place. A killed process leaves only
such a path behind; `remove_leftovers` removes it once its process is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.errors import CompressError, OutputError, from_os, hidden_os_error

_NUMBERS = itertools.count()
_TEMPORARY = re.compile(r"^\.(?P<name>.+)\.tmp-(?P<process>[0-9]+)(-[0-9]+)?$", re.DOTALL)
#: Bytes of a name that a temporary one repeats: file systems allow 255 in all.
_NAME = 200


@contextlib.contextmanager
def disk_errors(folder: Path, what: str = "cannot be written") -> Iterator[None]:
    """Turn errors of the file system into `CompressError`: no space or too many files (status 4), or an unusable place (2)."""
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        trouble = error if isinstance(error, OSError) else hidden_os_error(error)
        if trouble is None or (known := from_os(trouble, str(folder), what)) is None:
            raise
        raise known from error


def expanded(path: str | Path) -> Path:
    """The path, with ``~`` as the home of its user. Raises `CompressError` where there is no such user."""
    try:
        return (path if isinstance(path, Path) else Path(path)).expanduser()
    except RuntimeError:
        raise CompressError("there is no such user", where=str(path)) from None


def place(path: str | Path) -> Path:
    """The path of an output, with ``~`` as a home. Raises `OutputError` for ``.``, ``..`` and ``/``."""
    path = expanded(path)
    if path.name in ("", ".."):
        raise OutputError("names no folder of its own", where=str(path), fix="give the folder's name")
    return path


def _short(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_NAME])


def aside(path: Path) -> Path:
    """An unused temporary name beside ``path``."""
    while True:
        temp = path.with_name(f".{_short(path.name)}.tmp-{os.getpid()}-{next(_NUMBERS)}")
        if not os.path.lexists(temp):
            return temp


def is_temporary(path: Path) -> bool:
    """Whether a path has a name that `aside` gives."""
    return _TEMPORARY.match(path.name) is not None


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, if there is one. It is renamed first, so a killed process leaves no half folder."""
    try:
        folder = stat.S_ISDIR(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    if not _TEMPORARY.match(path.name):
        path = path.rename(aside(path))
    if folder:
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder``, held by this process; removed unless it was renamed away.

    Leftovers of dead processes are removed first. Raises `CompressError` for a full disk or an unwritable place.
    """
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        temp = aside(folder)
        temp.mkdir()
        held = os.open(temp, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: then the process counts
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temp
        finally:
            with contextlib.suppress(OSError):
                remove(temp)
            os.close(held)


def link_tree(source: Path, target: Path) -> None:
    """Hard-link every file below ``source`` into the folder ``target``, or copy it; links stay links.

    shutil.copytree would collect errors of the file system as text, without their numbers.
    """
    for path in sorted(source.iterdir()):
        new = target / path.name
        if path.is_dir() and not path.is_symlink():
            new.mkdir()
            link_tree(path, new)
            continue
        try:
            os.link(path, new, follow_symlinks=False)
        except OSError:
            shutil.copy2(path, new, follow_symlinks=False)


def leftovers(folder: Path, name: str | None = None) -> list[Path]:
    """Temporary paths of dead processes in a folder; only those of ``name`` where it is given."""
    try:
        with os.scandir(folder) as entries:
            hidden = [Path(entry.path) for entry in entries if entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = ((path, _TEMPORARY.match(path.name)) for path in sorted(hidden))
    return [
        p for p, m in matches if m and (name is None or m["name"] == _short(name)) and not _is_held(p, m["process"])
    ]


def remove_leftovers(path: Path) -> None:
    """Remove the temporary paths that dead processes left of ``path``."""
    for leftover in leftovers(path.parent, path.name):
        with contextlib.suppress(OSError):
            remove(leftover)


def _is_held(path: Path, process: str) -> bool:
    """Whether a process works on a temporary path: a folder is locked by its process, a file has its number in the name."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # gone meanwhile
    except OSError:
        return _is_alive(int(process))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return _is_alive(int(process))
    finally:
        os.close(descriptor)
    return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def prepare(path: Path, data: bytes) -> Path:
    """Write data to a new temporary file beside ``path``; `put` renames it to ``path``."""
    temp = aside(path)
    try:
        descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise
    return temp


def put(temp: Path, path: Path) -> None:
    """Rename a file of `prepare` to ``path``; a folder of that name is removed."""
    if path.is_dir() and not path.is_symlink():
        remove(path)
    temp.replace(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for a new file, which replaces ``path`` when the block ends; an error removes it."""
    temp = aside(path)
    try:
        yield temp
        with temp.open("rb") as file:
            os.fsync(file.fileno())
        put(temp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a small file; readers see the old one or the new one, whole. A link is replaced, not followed."""
    put(prepare(path, data), path)


def read_json(path: Path) -> Any | None:
    """The value of a JSON file; None for one that is absent, damaged, nested too deeply, a link, or no file.

    Raises `CompressError` where this process has no file descriptors or memory left.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            return json.loads(file.read())
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM) and (known := from_os(error, str(path))):
            raise known from error
        return None
    except (ValueError, RecursionError):
        return None


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def write_record(path: Path, kind: str, data: Mapping[str, Any]) -> None:
    """Write JSON values with their digest, for `read_record`. ``kind``: name of the record and version of its shape."""
    plain = json.loads(json.dumps(data))  # keys are text, tuples lists: what a reader digests
    sealed = {"schema": kind, "sha256": _digest(plain), "data": plain}
    write_atomically(path, (json.dumps(sealed) + "\n").encode())  # indenting takes Python ten times as long


def read_record(path: Path, kind: str) -> dict[str, Any] | None:
    """The values that `write_record` wrote as this kind; None where the file holds anything else."""
    record = read_json(path)
    if not isinstance(record, dict) or record.get("schema") != kind or not isinstance(data := record.get("data"), dict):
        return None
    try:
        return data if record.get("sha256") == _digest(data) else None
    except (ValueError, RecursionError):
        return None


def sha256(path: Path) -> str:
    """SHA-256 of a file's contents, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


#: Place of the bytes in a stamp.
SIZE = 1


def stamp(info: os.stat_result) -> list[int]:
    """Inode, bytes, and times of the last change of contents and of metadata: an unchanged stamp means an unchanged file."""
    return [info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]
