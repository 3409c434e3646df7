"""The command line in this process: its exit status, what it printed, and what it did to files that it must not change."""

from __future__ import annotations

import hashlib
import io
import os
import re
import signal
import sys
import time
import traceback
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tests.conftest import ROOT

#: CPU seconds and seconds that a command may take. A wait that needs no CPU is a hang as well.
CPU_LIMIT = 20.0
LIMIT = 120.0
#: Bad input, done: what commands without gates may end with.
ALLOWED = (0, 2)
_LOG = re.compile(r"the traceback is in (\S+)")
_PLACE = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


class Hang(BaseException):
    """A command went on for too long."""


@dataclass
class Outcome:
    """How a command ended.

    Attributes:
        status: exit status; ``traceback`` where something else than SystemExit came out; ``hang``.
        faults: what must not be: one line each, the place in the code at the end where it is known.
    """

    arguments: list[str]
    status: int | str
    out: str = ""
    err: str = ""
    trace: str = ""
    faults: list[str] = field(default_factory=list)


def call(
    arguments: Sequence[str], *, allowed: Sequence[int] = ALLOWED, cpu: float = CPU_LIMIT, one_line: bool = False
) -> Outcome:
    """Run ``compress`` with these arguments.

    Args:
        allowed: exit statuses that are no fault. one_line: a status of 2 says why in one line of standard error.
    """
    from compress.cli import main

    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors=e) for e in ("strict", "backslashreplace"))
    before = sys.argv, sys.stdout, sys.stderr
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    stuck: list[str] = []

    def late(number: int, frame: FrameType | None) -> None:
        stuck.append("".join(traceback.format_stack(frame)))
        raise Hang

    result = Outcome(list(arguments), 0)
    signal.signal(signal.SIGPROF, late)
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_PROF, cpu, 1.0)
    signal.setitimer(signal.ITIMER_REAL, LIMIT + cpu, 1.0)
    try:
        sys.argv, sys.stdout, sys.stderr = ["compress", *arguments], out, err
        main()
    except SystemExit as end:
        result.status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Hang:
        pass
    except BaseException as error:
        result.status, result.trace = "traceback", "".join(traceback.format_exception(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.argv, sys.stdout, sys.stderr = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for stream, name in ((out, "out"), (err, "err")):
        stream.flush()
        setattr(result, name, stream.buffer.getvalue().decode("utf-8", "replace"))  # type: ignore[attr-defined]
    if stuck:
        result.status, result.trace = "hang", stuck[0]
    _judge(result, allowed, one_line)
    return result


def _judge(result: Outcome, allowed: Sequence[int], one_line: bool) -> None:
    """Note what is wrong with how a command ended."""
    if found := _LOG.search(result.err):
        log = Path(found[1])
        if log.exists():
            result.trace = result.trace or log.read_text(errors="replace")
            log.unlink()
    if result.status not in allowed:
        said = (result.err.strip().splitlines() or [""])[-1][:160]
        result.faults.append(f"{result.arguments[0]} ended with {result.status}: {said} [{place(result.trace)}]")
    elif "Traceback (most recent call last)" in result.err:
        result.faults.append(f"{result.arguments[0]} printed a traceback")
    for name, text in (("standard output", result.out), ("standard error", result.err)):
        if raw := next(
            (c for c in text if not c.isprintable() and c not in "\n\t" and unicodedata.category(c) != "Zs"), None
        ):
            line = next(line for line in text.splitlines() if raw in line)
            result.faults.append(f"{result.arguments[0]} printed {raw!r} raw to {name}: {line[:100]!r}")
    if one_line and result.status == 2 and len(lines := result.err.strip().splitlines()) != 1:
        result.faults.append(f"{result.arguments[0]} said why in {len(lines)} lines: {result.err[:200]!r}")


def place(trace: str) -> str:
    """The innermost line of this package in a traceback, and the error's type."""
    ours = [m for m in _PLACE.findall(trace) if f"{ROOT}/compress/" in m[0]]
    where = "{}:{} {}".format(ours[-1][0].removeprefix(f"{ROOT}/"), *ours[-1][1:]) if ours else "?"
    last = [line for line in trace.splitlines() if line and not line.startswith(" ")]
    return f"{where} {last[-1][:80] if last else ''}"


def contents(folder: Path) -> dict[str, Any]:
    """What lies below a folder: of files SHA-256 of their bytes, of links their targets, else the kind."""
    found: dict[str, Any] = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(root, name)
            key = os.path.relpath(path, folder)
            if os.path.islink(path):
                found[key] = ("link", os.readlink(path))
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    found[key] = hashlib.sha256(file.read()).hexdigest()
            else:
                found[key] = "folder" if os.path.isdir(path) else "other"
    return found


def changed(before: dict[str, Any], folder: Path) -> list[str]:
    """Names that differ from what was there."""
    after = contents(folder)
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def cpu_seconds() -> float:
    """CPU time of this process."""
    return time.process_time()
