"""Processes of their own in 50 ms: forked from one that has imported torch and transformers already.

A cold interpreter with both costs four seconds. `Process` and `run` are used as `subprocess.Popen` and `subprocess.run` are. The code
they take runs as in ``python -c``, either beside this package or, with ``foreign=True``, where it cannot be imported.
Tests of what a command imports, or of how it is launched, need a cold interpreter: `subprocess` with `sys.executable`.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def _server() -> socket.socket:
    """The socket of the process that forks; it ends when this process does, and with it the socket."""
    ours, theirs = socket.socketpair()
    subprocess.Popen(
        [sys.executable, "-I", str(ROOT / "tests/preloaded.py"), str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        cwd="/",
        start_new_session=True,
    )
    theirs.close()
    return ours


class Process:
    """What tests use of `subprocess.Popen`, with stdout and stderr always piped, as text, and on request stdin too.

    ``seconds`` is the CPU time of all that have been waited for, which the operating system counts for another parent.
    """

    seconds = 0.0

    def __init__(
        self,
        code: str,
        *arguments: object,
        foreign: bool = False,
        environment: Mapping[str, str] | None = None,
        folder: Path | str = ROOT,
        stdin: bool = False,
    ) -> None:
        out, err, status = (os.pipe() for _ in range(3))
        given = [os.pipe()] if stdin else []
        request = {
            "code": code,
            "arguments": ["-c", *map(str, arguments)],
            "environment": {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(environment or {})},
            "folder": str(folder),
            "root": None if foreign else str(ROOT),
        }
        text = json.dumps(request).encode()
        socket.send_fds(
            _server(), [f"{len(text):8d}".encode()], [out[1], err[1], status[1], *(pipe[0] for pipe in given)]
        )
        _server().sendall(text)
        for end in (out[1], err[1], status[1], *(pipe[0] for pipe in given)):
            os.close(end)
        self.stdin = os.fdopen(given[0][1], "w") if given else None
        self.stdout, self.stderr, self._status = (os.fdopen(pipe[0]) for pipe in (out, err, status))
        self.pid = int(self._status.readline())
        self.returncode: int | None = None
        self._texts: dict[IO[str], str] = {}
        self._readers: list[threading.Thread] = []

    def poll(self) -> int | None:
        """The exit status, or None while it runs; minus the signal's number where one ended it."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float = 120) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("child", timeout)
            status, seconds = self._status.readline().split()
            self.returncode = int(status)
            Process.seconds += float(seconds)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """All that is printed until the end; after a timeout it can be asked for again."""
        deadline = time.monotonic() + timeout
        if not self._readers:
            for stream in (self.stdout, self.stderr):
                self._readers.append(threading.Thread(target=self._read, args=(stream,), daemon=True))
                self._readers[-1].start()
        for reader in self._readers:
            reader.join(max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired("child", timeout)
        self.wait(max(0.1, deadline - time.monotonic()))
        return self._texts[self.stdout], self._texts[self.stderr]

    def _read(self, stream: IO[str]) -> None:
        self._texts[stream] = stream.read()


def run(
    code: str,
    *arguments: object,
    foreign: bool = False,
    environment: Mapping[str, str] | None = None,
    folder: Path | str = ROOT,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run code to its end; the exit status is the caller's to look at."""
    process = Process(code, *arguments, foreign=foreign, environment=environment, folder=folder)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(code, process.wait(), out, err)
