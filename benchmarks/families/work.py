"""One process that runs cells: a class at a time, each cell within a limit of time."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.families.classes import Subject

#: CPU seconds of one cell.
LIMIT = 30
#: A worker that has grown to this many bytes ends, and another takes its place. Bound of its address space.
GROWN, SPACE = 2_500_000_000, 12_000_000_000

Result = dict[str, Any]


class _OutOfTime(BaseException):
    """Passes through ``except Exception``."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `_OutOfTime` after that many CPU seconds."""

    def stop(number: int, frame: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


#: The cell of another tool: its results are counted beside ours.
PEER = "peer"


def cells_of(subject: Subject, cells: Sequence[str], stock: Any, peer: Any = None) -> Iterator[tuple[str, Result]]:
    """Run cells of a class; yields each cell's name with its result, after ``(name, {})`` when it begins.

    The cell `PEER` is asked of the process ``peer``, which answers with a result.

    A result has ``verdict`` (works, refused, wrong, unsuited), ``reason``, ``seconds`` of CPU, and ``at`` with the last
    lines of a traceback.
    """
    from benchmarks.families import cells as table
    from benchmarks.families.judge import Judge, Wrong
    from benchmarks.families.pico import Unsuited, make

    place = Path(tempfile.mkdtemp(prefix="families-"))
    try:
        yield "model", {}
        started = time.process_time()
        try:
            with limited(2 * LIMIT):
                pico = make(subject, place, teacher="distill" in cells)
                judge = Judge(stock, place)
                judge.original(pico)
        except (_OutOfTime, Exception) as error:
            reason = {
                Unsuited: str(error),
                Wrong: f"transformers does not reload its own checkpoint: {error}",
                _OutOfTime: f"no pico model in {2 * LIMIT} seconds",
            }.get(type(error), f"no data: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            seconds = round(time.process_time() - started, 2)
            for cell in cells:
                yield cell, {"verdict": "unsuited", "reason": reason, "seconds": seconds}
                seconds = 0.0
            return
        for cell in cells:
            yield cell, {}
            if cell == PEER:
                request = {"folder": pico.folder, "class": pico.class_name, "samples": pico.samples, "to": place / PEER}
                answer = peer.ask(**{key: str(value) for key, value in request.items()})
                yield cell, {"verdict": "refused", "reason": answer.pop("error", ""), "seconds": 0, **answer}
                continue
            yield cell, _result(lambda cell=cell: table.run(cell, pico, place, judge))
            for written in place.glob(f"{cell}*"):
                shutil.rmtree(written, ignore_errors=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _result(run: Any) -> Result:
    from benchmarks.families.judge import Wrong
    from compress.errors import CompressError

    started = time.process_time()
    result: Result = {"verdict": "works", "reason": ""}
    try:
        with limited(LIMIT):
            result["reason"] = run()
    except CompressError as error:
        result = {"verdict": "refused", "reason": str(error)}
    except Wrong as error:
        result = {"verdict": "wrong", "reason": str(error)}
    except _OutOfTime:
        result = {"verdict": "wrong", "reason": f"took more than {LIMIT} seconds"}
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/benchmarks/" not in f.filename]
        at = [f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno} {f.name}" for f in frames]
        result = {"verdict": "wrong", "reason": f"{type(error).__name__}: {text}", "at": at[-6:]}
    return {**result, "seconds": round(time.process_time() - started, 2)}


def serve(connection: Connection, python: str | None = None) -> None:
    """Take ``(subject, cells)`` from a connection, and send ``(cell, result)`` as in `cells_of`, then None for "next".

    Args:
        python: the interpreter of `peer.py`.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # what is written here is thrown away
    import torch
    import transformers

    from benchmarks.families.judge import Stock
    from benchmarks.families.stock import admit_torchvision

    admit_torchvision()
    gc.freeze()  # what is imported is not looked at again
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from benchmarks.families import peer

    stock, other = Stock(), Stock(peer.__file__, python) if python else None
    try:
        connection.send(None)
        while (task := connection.recv()) is not None:
            for cell, result in cells_of(*task, stock, other):
                connection.send((cell, result))
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > GROWN:
                return
            connection.send(None)
    except (EOFError, KeyboardInterrupt):
        pass
    finally:
        stock.close()
        if other is not None:
            other.close()
