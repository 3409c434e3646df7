"""Which passes work on which of transformers' classes: `make families` writes docs/families.md.

Every class of the mappings of causal and masked language models, sequence-to-sequence models, classifiers, and models of
images and speech becomes a pico model with random weights. Each cell applies a pass, and transformers, in a process without
this package, loads what was written. Results are files in out/families, and cells that have one are not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections import deque
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.families import page
from benchmarks.families.cells import CELLS
from benchmarks.families.classes import KINDS, Subject, subjects
from benchmarks.families.work import PEER, serve

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "out" / "families"
#: Seconds of a cell on the clock, after which its process is ended: the limit of CPU seconds ends all but what hangs.
HANGS = 300


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    options.add_argument("--only", nargs="+", metavar="TYPE", help="model types, or names of classes")
    options.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    options.add_argument("--classes", nargs="+", choices=KINDS, help="kinds of classes")
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--fresh", action="store_true", help="run cells that have a result, too")
    options.add_argument("--again", nargs="+", choices=["refused", "wrong", "unsuited", "older"], default=[],
                         help="run cells with such results, too; older: of another commit")  # fmt: skip
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--peer", metavar="PYTHON",
                         help="run llm-compressor's GPTQ instead, by an interpreter that has it")  # fmt: skip
    options.add_argument("--page", action="store_true", help="only write docs/families.md from the results")
    return options


def commit() -> str:
    """The commit of the code, with + where files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def read(results: Path, subject: Subject, cell: str) -> dict[str, Any] | None:
    """The stored result of a cell."""
    path = results / subject.name / f"{cell}.json"
    return json.loads(path.read_text()) if path.exists() else None


def to_do(options: argparse.Namespace, code: str) -> deque[tuple[Subject, list[str]]]:
    """Classes with the cells that are to be run."""
    tasks: deque[tuple[Subject, list[str]]] = deque()
    for subject in subjects():
        if options.only and not {subject.model_type, subject.class_name} & set(options.only):
            continue
        if options.classes and not set(options.classes) & set(subject.kinds):
            continue
        cells = []
        for cell in [PEER] if options.peer else options.cells:
            known = read(options.results, subject, cell)
            again = known is None or options.fresh or known["verdict"] in options.again
            if again or (known and "older" in options.again and known["code"] != code):
                cells.append(cell)
        if cells:
            tasks.append((subject, cells))
    return tasks


class Worker:
    """A process that runs cells, what it is at, and since when."""

    def __init__(self, context: Any, python: str | None) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, python), daemon=False)
        self.process.start()
        theirs.close()
        self.task: tuple[Subject, list[str]] | None = None
        self.cell, self.since = "", time.monotonic()
        self.done: set[str] = set()

    def give(self, task: tuple[Subject, list[str]]) -> None:
        """Hand it a class and its cells."""
        self.task, self.done, self.cell, self.since = task, set(), "model", time.monotonic()
        self.connection.send(task)

    def end(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.kill()
        self.process.join()


class Run:
    """All tasks, on several workers."""

    def __init__(
        self, tasks: deque[tuple[Subject, list[str]]], results: Path, code: str, python: str | None = None
    ) -> None:
        self._tasks, self._results, self._code, self._python = tasks, results, code, python
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[Connection, Worker] = {}
        self._total, self._finished, self._started = len(tasks), 0, time.monotonic()

    def run(self, workers: int) -> None:
        """Run all cells; a worker that dies or hangs is replaced, and its cell counts as wrong."""
        for _ in range(min(workers, len(self._tasks))):
            self._start()
        try:
            while self._workers:
                for connection in wait(list(self._workers), timeout=5):
                    assert isinstance(connection, Connection)
                    self._hear(self._workers[connection])
                for worker in list(self._workers.values()):
                    if worker.task is not None and time.monotonic() - worker.since > HANGS:
                        self._lost(worker, f"hung for {HANGS} seconds")
        finally:
            for worker in self._workers.values():
                worker.end()

    def _start(self) -> None:
        worker = Worker(self._context, self._python)
        self._workers[worker.connection] = worker

    def _hear(self, worker: Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self._lost(worker, "the process died")
            return
        worker.since = time.monotonic()
        if message is None:
            self._next(worker)
            return
        assert worker.task is not None
        worker.cell, result = message
        if result:
            self._keep(worker.task[0], worker.cell, result)
            worker.done.add(worker.cell)

    def _next(self, worker: Worker) -> None:
        if worker.task is not None:
            self._told(worker.task)
        worker.task = None
        if self._tasks:
            worker.give(self._tasks.popleft())
            return
        worker.connection.send(None)
        del self._workers[worker.connection]
        worker.process.join(10)
        worker.end()

    def _lost(self, worker: Worker, reason: str) -> None:
        """Note the cell that a worker was lost with, and let another go on."""
        del self._workers[worker.connection]
        worker.end()
        if worker.task is not None:
            subject, cells = worker.task
            if worker.cell in ("", "model") and not worker.done:
                for cell in cells:
                    self._keep(
                        subject, cell, {"verdict": "unsuited", "reason": f"no pico model: {reason}", "seconds": 0}
                    )
                    worker.done.add(cell)
            elif worker.cell not in worker.done:
                self._keep(subject, worker.cell, {"verdict": "wrong", "reason": reason, "seconds": 0})
                worker.done.add(worker.cell)
            if left := [cell for cell in cells if cell not in worker.done]:
                self._tasks.appendleft((subject, left))
            else:
                self._told(worker.task)
        if self._tasks:
            self._start()

    def _keep(self, subject: Subject, cell: str, result: dict[str, Any]) -> None:
        folder = self._results / subject.name
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f".{cell}.json"
        new.write_text(json.dumps({**result, "code": self._code}, ensure_ascii=False, indent=1) + "\n")
        new.replace(folder / f"{cell}.json")

    def _told(self, task: tuple[Subject, list[str]]) -> None:
        self._finished += 1
        subject, cells = task
        results = [read(self._results, subject, cell) or {} for cell in cells]
        marks = "".join(page.MARKS.get(result.get("verdict", ""), "?") for result in results)
        seconds = sum(result.get("seconds", 0) for result in results)
        passed = time.monotonic() - self._started
        print(f"{self._finished}/{self._total} {passed:.0f} s  {marks:11} {seconds:5.1f} s  {subject.name}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run what is to be run, then write the page; 1 where a cell is wrong."""
    options = parser().parse_args(arguments)
    if not options.page:
        code = commit()
        Run(to_do(options, code), options.results, code, options.peer).run(options.workers)
    rows = {subject: {cell: read(options.results, subject, cell) for cell in CELLS} for subject in subjects()}
    peers = {subject: result for subject in rows if (result := read(options.results, subject, PEER))}
    if options.results != RESULTS:
        return page.write(rows, options.results / "families.md", peers)
    page.put(rows, ROOT / "README.md")
    return page.write(rows, ROOT / "docs" / "families.md", peers)


if __name__ == "__main__":
    sys.exit(main())
