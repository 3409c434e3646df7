"""The errors that a user can meet, each with the exit status of the command.

Exit statuses: 0 done, 1 a gate failed, 2 bad recipe, option or input, 3 a gate is inconclusive, 4 out of memory or
disk, 70 a bug, 130 interrupted. A message is one line: where, what is wrong, what to do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compress.escape import in_one_line

EXIT_OK = 0
EXIT_GATE_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INCONCLUSIVE = 3
EXIT_RESOURCES = 4
EXIT_BUG = 70
EXIT_INTERRUPTED = 130


class CompressError(Exception):
    """Base of all errors that the user can fix.

    Args:
        what: what is wrong, one line, no full stop.
        where: the place: ``file:line:col``, a path, a tensor or module name.
        fix: what to do about it, one line.
    """

    exit_status = EXIT_BAD_INPUT

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return in_one_line(f"{text}; {self.fix}" if self.fix else text)


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Within, an error that names no place gets this one."""
    try:
        yield
    except CompressError as error:
        error.where = error.where or where
        raise


@dataclass(frozen=True)
class Mistake:
    """One mistake in a recipe.

    Attributes:
        message: what is wrong. fix: what to do; empty where nothing is said.
        file: the recipe or a file that it extends, or an option; None for a recipe that was made in Python.
        line, column: from 1; 0 where only the file is known. width: characters of the line that are wrong.
    """

    message: str
    fix: str = ""
    file: str | None = None
    line: int = 0
    column: int = 0
    width: int = 0


class RecipeError(CompressError):
    """One or more mistakes in a recipe.

    ``problems`` holds the rendered text of the first ones (several lines each), ``mistakes`` the same as data. ``count`` is the
    number of all.
    """

    #: Number of mistakes that are shown. More are usually one mistake, repeated.
    SHOWN = 50

    def __init__(self, problems: list[str], count: int | None = None, mistakes: Sequence[Mistake] = ()) -> None:
        count = len(problems) if count is None else count
        super().__init__(f"{count} mistake{'s' if count != 1 else ''} in the recipe")
        self.problems = problems
        self.mistakes = tuple(mistakes)
        self.count = count

    def __str__(self) -> str:
        left = [f"… and {self.count - len(self.problems)} more"] if self.count > len(self.problems) else []
        return "\n".join([*self.problems, *left, *([self.what] if self.count > 1 else [])])


class CheckpointError(CompressError):
    """A checkpoint that cannot be opened, is damaged, or does not load cleanly."""


class DataError(CompressError):
    """Text, images or labels that are missing, unreadable, too few, or shared between sets that must be disjoint."""


class PassError(CompressError):
    """A pass that cannot apply its settings to this checkpoint.

    ``key`` names the setting at fault, so that the line of the recipe is shown.
    """

    def __init__(self, what: str, *, key: str | None = None, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what, where=where, fix=fix)
        self.key = key


class OutputError(CompressError):
    """The output folder cannot be used: it holds other files, is busy, or is not writable."""


class ReportError(CompressError):
    """A report or a baseline that cannot be read, or lacks a value that a gate needs."""


class ResourceError(CompressError):
    """Not enough memory or disk space."""

    exit_status = EXIT_RESOURCES


class Interrupted(CompressError):
    """The run was stopped by SIGINT or SIGTERM; finished stages are kept."""

    exit_status = EXIT_INTERRUPTED


def one_line(error: BaseException) -> str:
    """The message of another package's error in one line of at most 200 characters; the name of its type if it is empty."""
    return " ".join(str(error).split())[:200] or type(error).__name__


#: Errors of resources, which another path does not fix: memory, disk, files, threads.
_RESOURCES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "the disk is full"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "too many files are open"),
    errno.ENOMEM: "out of memory",
    errno.EAGAIN: "no process or thread can be started",
    errno.EIO: "the disk fails to read or write",
}
_FIXES = {
    "the disk is full": "free some space and run again; finished stages are kept",
    "too many files are open": "raise the limit (ulimit -n) and run again; finished stages are kept",
    "the disk fails to read or write": "check the disk",
}


def from_os(error: OSError, where: str | None = None, what: str = "cannot be used") -> CompressError | None:
    """The `CompressError` for an error of the operating system: a resource that ran out, or an unusable file or folder.

    None for an error that concerns no file, such as a lost connection. ``where`` is used if the error names no file.
    """
    file = error.filename if isinstance(error.filename, (str, bytes)) else None
    name = file.decode(errors="replace") if isinstance(file, bytes) else file
    if (short := _RESOURCES.get(error.errno or 0)) is not None:
        if isinstance(error.filename2, str):  # of a copy: where to
            name = error.filename2
        return ResourceError(short, where=name or where, fix=_FIXES.get(short))
    if error.errno is None or (name is None and (where is None or isinstance(error, (ConnectionError, TimeoutError)))):
        return None
    return OutputError(f"{what}: {error.strerror}", where=name or where)


def is_lack(error: BaseException) -> bool:
    """Whether the machine ran out of memory, threads, files or disk, or its disk fails."""
    text = str(error)
    if isinstance(error, (MemoryError, ResourceError)) or type(error).__name__ == "OutOfMemoryError":
        return True
    if "can't allocate memory" in text or "can't start new thread" in text:  # torch's CPU allocator, and Python
        return True
    trouble = error if isinstance(error, OSError) else hidden_os_error(error)
    return trouble is not None and isinstance(from_os(trouble), ResourceError)


#: End of the message with which libraries in Rust report an error of the operating system.
_RUST = re.compile(r"\(os error (\d+)\)")


def hidden_os_error(error: BaseException) -> OSError | None:
    """The error of the operating system behind a library's own error; None if there is none.

    safetensors and tokenizers give its number in their message. torch's archive writer fails a second time when it closes a
    file that could not be written; the first error is the context of that exception.
    """
    if (number := _RUST.search(str(error))) is not None:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if not (isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStream" in str(error))):
        return None
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause if cause is not None else OSError(errno.EIO, os.strerror(errno.EIO))
