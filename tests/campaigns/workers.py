"""Cases in processes that may die: each is forked from one that has everything imported, and has little memory.

A case that kills its process, or never comes back, is a failure of its own; the next process goes on behind it.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

#: Cases of one process, which keeps what cases leave in memory from adding up.
BATCH = 250
#: What a process may take beyond what it begins with, in bytes. No case here needs as much: one that asks is a fault.
MEMORY = 3 << 30
#: Seconds without a word after which a process is ended. `command` stops what Python can stop long before.
SILENCE = 300.0


@dataclass
class Case:
    """What came of one case."""

    number: int
    statuses: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    cpu: float = 0.0
    more: dict[str, int] = field(default_factory=dict)


def run(work: Callable[[int], Case], first: int, last: int) -> Iterator[Case]:
    """Cases ``first`` to ``last`` (not with it), in order."""
    number = first
    while number < last:
        for case in _process(work, number, min(last, number + BATCH)):
            yield case
            number = case.number + 1


def _process(work: Callable[[int], Case], first: int, last: int) -> Iterator[Case]:
    """As `run`, in one process; where it dies, the case that it died of comes last."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        os.close(reading)
        _work(work, first, last, writing)
    os.close(writing)
    number, rest, silent = first, b"", False
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while number < last:
            silent = not select.select([pipe], [], [], SILENCE)[0]
            data = b"" if silent else pipe.read(1 << 16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield Case(**json.loads(line))
                number += 1
    if silent:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if number < last:
        said = "hang" if silent else "killed"
        yield Case(number, [said], [f"the process ended by itself: {said}, wait status {status}"])


def _work(work: Callable[[int], Case], first: int, last: int, writing: int) -> None:
    """The child: one line of JSON for each case."""
    import torch

    torch.set_num_threads(1)  # makes torch's pool of threads anew: two threads that do so at once end in an assertion
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        for number in range(first, last):
            line = json.dumps(vars(work(number))).encode() + b"\n"
            while line:
                line = line[os.write(writing, line) :]
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
