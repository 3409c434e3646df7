"""The command line in forked children, stopped or failed at a chosen change of the file system.

The parent imports torch, transformers and the package once and never runs a backward pass, so a child starts in milliseconds.
Audit hooks (PEP 578) see every change that Python makes to the file system: nothing of the product is patched.
"""

from __future__ import annotations

import errno
import importlib
import os
import pkgutil
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Audit events that change the file system; the first argument is the path, or the name below a directory's descriptor.
CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"})
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: What a failing disk, a full table of files, or a mount without rights answers.
ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.EACCES, errno.EROFS, errno.EPERM)


@dataclass(frozen=True)
class Outcome:
    """How a child ended: exit status (negative: a signal; None: it hung and was killed), output, changes made."""

    status: int | None
    output: str
    changes: int

    @property
    def traceback(self) -> bool:
        """Whether a person would have seen a traceback."""
        return "Traceback (most recent call last)" in self.output


#: What commands import late, beside the package's own modules.
_LATE = (
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.quantizers.auto",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
)


def preload() -> None:
    """Import what commands need, the whole package with it. Call it before the first fork."""
    import torch

    import compress

    torch.set_num_threads(1)
    own = (m.name for m in pkgutil.walk_packages(compress.__path__, "compress.") if not m.name.endswith("__main__"))
    for name in (*_LATE, *own):
        importlib.import_module(name)


def is_change(event: str, arguments: tuple[Any, ...], below: str) -> bool:
    """Whether an audit event changes a file below a folder (relative names come with a directory's descriptor)."""
    if event == "open":
        path, mode, flags = arguments
        writes = (isinstance(mode, str) and any(c in mode for c in "wax+")) or (
            isinstance(flags, int) and bool(flags & _WRITES)
        )
        if not writes:
            return False
    elif event in CHANGES:
        path = arguments[0]
    elif event == "ctypes.dlsym":
        return arguments[1] == "renameat2"
    else:
        return False
    try:
        text = os.fsdecode(path)
    except TypeError:  # a descriptor
        return False
    return not text.startswith("/") or text.startswith(below)


def command(
    arguments: Sequence[str],
    below: Path,
    *,
    at: int = 0,
    act: Callable[[str], None] | None = None,
    before: Callable[[], None] | None = None,
    limit: float = 120.0,
) -> Outcome:
    """Run ``compress ARGUMENTS`` in a forked child.

    Args:
        below: changes outside this folder are not counted.
        at: the number of the change (from 1) before which ``act`` is called with the path; 0 for never.
        act: `kill`, or a function that raises; every later change calls it too if it raises (a broken disk stays broken).
        before: called in the child first (limits of resources, say).
        limit: seconds after which a child counts as hung.
    """
    told, tell = os.pipe()  # a byte for every change
    heard, speak = os.pipe()  # standard output and error: no file, so that limits of the disk leave it alone
    child = os.fork()
    if child == 0:
        os.close(told)
        os.close(heard)
        _child(list(arguments), str(below), speak, tell, at, act, before)
    os.close(tell)
    os.close(speak)
    count, output, status = 0, b"", None
    with os.fdopen(told, "rb", 0) as changes, os.fdopen(heard, "rb", 0) as text:
        for stream in (changes, text):
            os.set_blocking(stream.fileno(), False)
        deadline = time.monotonic() + limit
        while status is None and time.monotonic() < deadline:
            done, raw = os.waitpid(child, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(raw)
            else:
                select.select([text], [], [], 0.01)
                if not (piece := text.read(1 << 20)):
                    time.sleep(0.005)
                output += piece or b""
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        output += text.read(1 << 20) or b""
        while piece := changes.read(1 << 20):
            count += len(piece)
    return Outcome(status, output.decode(errors="replace"), count)


def _child(
    arguments: list[str],
    below: str,
    speak: int,
    tell: int,
    at: int,
    act: Callable[[str], None] | None,
    before: Callable[[], None] | None,
) -> None:
    """The rest of the child's life."""
    os.dup2(speak, 1)
    os.dup2(speak, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = ["compress", *arguments]
    count = 0

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if not is_change(event, values, below):
            return
        count += 1
        os.write(tell, b".")
        if act is not None and at and count >= at:
            act(os.fsdecode(values[0]) if event != "ctypes.dlsym" else "")

    status: int = 70
    try:
        import torch

        from compress.cli import main

        # torch's pool of threads is made anew after a fork, by whoever asks first: two threads at once end in an assertion
        torch.set_num_threads(1)
        if before is not None:
            before()
        sys.addaudithook(hook)
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def kill(path: str) -> None:
    """SIGKILL to oneself, before the change."""
    os.kill(os.getpid(), signal.SIGKILL)


def failing(number: int) -> Callable[[str], None]:
    """A disk that refuses every further change."""

    def act(path: str) -> None:
        raise OSError(number, os.strerror(number), path)

    return act


def failing_once(number: int) -> Callable[[str], None]:
    """A disk that refuses one change, and takes the next."""
    done = False

    def act(path: str) -> None:
        nonlocal done
        if not done:
            done = True
            raise OSError(number, os.strerror(number), path)

    return act
