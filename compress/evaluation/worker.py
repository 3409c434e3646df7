"""Processes that measure: each answers a line of JSON with a line of JSON, and several work in turns."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from compress.errors import CheckpointError, CompressError, ResourceError
from compress.progress import Progress

#: Rounds: as many as fit into ``SECONDS``, within these bounds.
SECONDS, FEWEST, MOST = 8.0, 10, 40
#: Seconds without an answer after which a worker is killed.
PATIENCE = 900.0


class Worker:
    """A process that answers each line of JSON with a line of JSON; ``what``: what it measures, for errors."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str], what: str) -> None:
        self.process = process
        self.errors = errors
        self.what = what

    def answer(self, patience: float | None = PATIENCE) -> dict[str, Any]:
        """The next answer.

        Args:
            patience: seconds after which the process is killed; None waits for any time.

        Raises:
            CheckpointError: the process says that it cannot. ResourceError: memory is short.
            CompressError: it ended, with its last words.
        """
        assert self.process.stdout is not None
        timer = threading.Timer(patience or 0, self.process.kill)
        if patience is not None:
            timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            last = ([x.strip() for x in self.errors.read().splitlines() if x.strip()] or [""])[-1][:300]
            if status == -9:
                raise ResourceError(f"the process that measures {self.what} was killed", fix="it may need more memory")
            raise CompressError(f"the process that measures {self.what} ended with status {status}: {last}")
        data: dict[str, Any] = json.loads(line)
        if "error" in data:
            if data.get("resources"):
                raise ResourceError(data["error"])
            raise CheckpointError(data["error"])
        return data

    def send(self, data: dict[str, Any]) -> None:
        """Send a command; `answer` has the answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` raises the reason
            self.process.stdin.write(json.dumps(data) + "\n")
            self.process.stdin.flush()


@contextlib.contextmanager
def started(command: Sequence[str], environment: Mapping[str, str], what: str) -> Iterator[Worker]:
    """Start a worker and kill it at the end. It also ends when its stdin closes."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,  # this process handles Ctrl-C
        )
        try:
            yield Worker(process, errors, what)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


def in_turns(
    workers: Sequence[Worker],
    command: Mapping[str, Any],
    title: str,
    progress: Progress,
    rounds: int | None = None,
) -> list[dict[str, list[float]]]:
    """Each worker's ``prefill`` and ``decode`` by round, in alternating order; empty for what an answer has not.

    Args:
        command: to which an answer has both, and the ``seconds`` of all. rounds: as many as fit into `SECONDS` by default, by
            a timed warm-up.
    """

    def ask(worker: Worker) -> dict[str, Any]:
        worker.send(dict(command))
        return worker.answer()

    once = sum(ask(worker)["seconds"] for worker in workers)
    rounds = rounds or int(max(FEWEST, min(MOST, SECONDS / max(once, 1e-6))))
    samples: list[dict[str, list[float]]] = [{"prefill": [], "decode": []} for _ in workers]
    with progress.task(title, rounds, "rounds") as bar:
        for number in range(rounds):
            order = range(len(workers)) if number % 2 == 0 else reversed(range(len(workers)))
            for i in order:
                answer = ask(workers[i])
                for name in ("prefill", "decode"):
                    if answer[name] is not None:
                        samples[i][name].append(answer[name])
            bar.advance()
    return samples
