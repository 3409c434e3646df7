"""A command ends with one clear line and the right exit status, whatever happens.

Only a failed gate gives status 1, by `Judged`. An unexpected exception is a bug and gives 70.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from compress.errors import (
    EXIT_BAD_INPUT,
    EXIT_BUG,
    EXIT_GATE_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_RESOURCES,
    CompressError,
    from_os,
    hidden_os_error,
)
from compress.escape import printable


class Terminated(BaseException):
    """SIGINT or SIGTERM: temporary folders are removed, finished stages are kept. Typer swallows a KeyboardInterrupt."""


class Judged(SystemExit):
    """Ends a command whose exit status is a verdict."""


def guarded(command: Callable[[], object]) -> None:
    """Run a command and end the process. `compress.errors` defines the exit status of each kind of error."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        status = _guarded(command)
    except BaseException:  # the handling itself failed, for example without memory for a message
        status = EXIT_BUG
    status = _flushed(status)
    if _several():
        # threads of torch.distributed sometimes abort the interpreter (SIGABRT) while it shuts down
        os._exit(status)
    sys.exit(status)


def _guarded(command: Callable[[], object]) -> int:
    with contextlib.suppress(ValueError):  # only the main thread can handle signals
        stops = _Stops()
        signal.signal(signal.SIGTERM, stops)
        signal.signal(signal.SIGINT, stops)
    try:
        command()
    except SystemExit as end:
        return _ended(end)
    except CompressError as error:
        return fail(str(error), error.exit_status)
    except (Terminated, KeyboardInterrupt):
        return fail("interrupted; finished stages are kept, run the same command to continue", EXIT_INTERRUPTED)
    except BrokenPipeError as error:
        return EXIT_BAD_INPUT if error.filename is None else _bug(error)
    except MemoryError:
        return fail("out of memory", EXIT_RESOURCES)
    except OSError as error:
        if (known := from_os(error)) is not None:
            return fail(str(known), known.exit_status)
        return _bug(error)
    except BaseException as error:  # also panics of Rust libraries, which are not an Exception
        if _out_of_resources(error):
            return fail(f"out of memory or threads: {_first_line(error)}", EXIT_RESOURCES)
        if (hidden := hidden_os_error(error)) is not None and (known := from_os(hidden)) is not None:
            return fail(str(known), known.exit_status)
        return _bug(error)
    return EXIT_OK


def fail(text: str, status: int) -> int:
    """Print one message on stderr. Returns the status; raises nothing if stderr is closed."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    text = printable(text)
    with contextlib.suppress(OSError, ValueError):
        if "\n" in text:
            from compress.cli.colour import shows_colour, styled_mistakes

            text = styled_mistakes(text) if shows_colour(sys.stderr) else text
        print(f"compress: {text}" if "\n" not in text else text, file=sys.stderr, flush=True)
    return status


def _bug(error: BaseException) -> int:
    return fail(f"bug: {type(error).__name__}: {_first_line(error)}; {_log(error)}", EXIT_BUG)


def _ended(end: SystemExit) -> int:
    """Exit status of a command that raised SystemExit. Only a verdict may give 1; from anything else, 1 is a bug."""
    code = EXIT_OK if end.code is None else end.code
    if isinstance(end, Judged) or (isinstance(code, int) and code != EXIT_GATE_FAILED):
        return int(code)
    cause = end.__context__
    if isinstance(cause, OSError) and cause.errno == errno.EPIPE:
        return EXIT_BAD_INPUT
    return _bug(cause.__cause__ or cause if cause is not None else end)


def _flushed(status: int) -> int:
    """Flush stdout and stderr. If that fails later, the interpreter sets an exit status of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if status == EXIT_OK and isinstance(error, OSError):
                known = from_os(error, "standard output", "cannot be written")
                status = EXIT_BAD_INPUT if error.errno == errno.EPIPE or known is None else known.exit_status
                if error.errno != errno.EPIPE and known is not None:
                    fail(str(known), status)
    return status


def _several() -> bool:
    """Whether torchrun started this process with others. The command that needs the number reports a malformed one."""
    count = os.environ.get("WORLD_SIZE", "")
    return count.isdecimal() and int(count) > 1


class _Stops:
    """Signal handler: the first signal starts the clean-up, the second prints a note, the third ends the process at once."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 1:
            raise Terminated
        if self.count == 2:
            os.write(2, b"\ncompress: cleaning up; once more ends it at once\n")
        else:
            os._exit(EXIT_INTERRUPTED)


def _first_line(error: BaseException) -> str:
    try:
        return (str(error).splitlines() or [""])[0][:200]
    except Exception:  # its __str__ raises
        return ""


def _out_of_resources(error: BaseException) -> bool:
    """Whether torch ran out of CUDA or CPU memory, or no more threads can start."""
    text = str(error)
    return (
        type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text
        or "can't start new thread" in text
    )


def _log(error: BaseException) -> str:
    """Write the traceback to a file and return a sentence that names it; if that fails, a sentence with the last line."""
    try:
        import tempfile
        import traceback

        handle, name = tempfile.mkstemp(prefix="compress-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(traceback.format_exception(error)))
        return f"the traceback is in {name}"
    except Exception as trouble:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = "" if trace is None else f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        return f"it happened{place}; no traceback could be written: {_first_line(trouble)}"
