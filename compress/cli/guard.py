"""Whatever happens, a command ends with one clear line and the right exit status."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from compress.errors import EXIT_BAD_INPUT, EXIT_BUG, EXIT_INTERRUPTED, EXIT_RESOURCES, CompressError


class Terminated(BaseException):
    """SIGINT or SIGTERM: temporary folders are removed, finished stages kept. Typer would swallow a KeyboardInterrupt."""


def guarded(app: Callable[..., Any]) -> None:
    """Run the app and end the process with the exit status that DESIGN gives each kind of error."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        _guarded(app)
        return
    try:
        _guarded(app)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        # threads of torch.distributed that want the interpreter while it shuts down end it by SIGABRT, now and then
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def _guarded(app: Callable[..., Any]) -> None:
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, _terminate)
    try:
        app(standalone_mode=True)
    except CompressError as error:
        fail(str(error), error.exit_status)
    except (Terminated, KeyboardInterrupt):
        fail("interrupted; finished stages are kept, run the same command to go on", EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BAD_INPUT)
    except MemoryError:
        fail("out of memory", EXIT_RESOURCES)
    except Exception as error:
        if _out_of_memory(error):
            fail(f"out of memory: {str(error).splitlines()[0]}", EXIT_RESOURCES)
        fail(f"bug: {type(error).__name__}: {_first_line(error)}; the traceback is in {_log(error)}", EXIT_BUG)


def fail(text: str, status: int) -> None:
    """One message on stderr, then out."""
    sys.stdout.flush()
    print(f"compress: {text}" if "\n" not in text else text, file=sys.stderr)
    sys.exit(status)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _out_of_memory(error: Exception) -> bool:
    """torch's CUDA error, or its CPU allocator's."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _log(error: BaseException) -> Path:
    """A file with the traceback."""
    handle, name = tempfile.mkstemp(prefix="compress-", suffix=".log")
    with os.fdopen(handle, "w") as file:
        file.write("".join(traceback.format_exception(error)))
    return Path(name)
