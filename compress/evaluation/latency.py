"""Prefill time, decode time and memory of two checkpoints, measured in turns.

Each model is in its own process (`latency_worker`), so neither warms caches or fills memory for the other. Only one works at a
time, in alternating order.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from compress.checkpoint.sidecars import LinkedFolder
from compress.errors import CheckpointError, CompressError, ResourceError
from compress.evaluation.latency_lengths import Lengths
from compress.evaluation.latency_settings import GENERATED, PROMPT, LatencySettings
from compress.memory import available_memory, resident_memory
from compress.progress import Progress, SilentProgress

#: Rounds: as many as fit into ``SECONDS``, within these bounds.
SECONDS, FEWEST, MOST = 8.0, 10, 40
#: Seconds without an answer after which a worker is killed.
PATIENCE = 900.0


def measure_latency(
    folders: Sequence[str | Path],
    *,
    dtype: str,
    device: str,
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    threads: int | None = None,
    seed: int = 0,
    lengths: LatencySettings | None = None,
    max_ram: int | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure ``[original, candidate]`` interleaved, after a warm-up.

    Args:
        lengths: settings with the lengths of prompts at which cost is measured too. max_ram: most bytes that this process
            and those that measure may hold; by default what the machine has.

    Returns:
        ``original`` and ``candidate``. Each has ``prefill``, seconds for the prompt with logits of the last token only, and
        ``decode``, seconds per generated token (None for models that do not generate). Both have ``samples`` by round,
        ``median`` and ``p90``; the candidate's also ``ratio`` with one-sided 95 % bounds ``lower`` and ``upper``. ``memory``
        has the ``peak`` bytes of loading and inference beyond what the process had before (on a GPU: allocated bytes), and
        the candidate's its ``ratio``. With lengths also ``lengths``, ``fit`` and ``not_tried``, see `latency_lengths`.

    Raises:
        CompressError: a worker cannot load its model, or died.
    """
    settings = {"dtype": dtype, "device": device, "threads": threads, "trust_remote_code": trust_remote_code}
    settings["ignore_auto_map"] = ignore_auto_map
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(
                _worker({**settings, "folder": str(folder), "allow_links": isinstance(folder, LinkedFolder)})
            )
            for folder in folders
        ]
        facts = [worker.answer() for worker in workers]
        positions = [f["positions"] for f in facts if f["positions"] is not None]
        prompt = min([PROMPT, *(max(p - GENERATED, 1) for p in positions)])
        task = {"seed": seed, "prompt": prompt, "vocabulary": min(f["vocabulary"] for f in facts)}
        task["generated"] = min([GENERATED, *(max(p - prompt, 1) for p in positions)])
        task["decode"] = all(f["generates"] for f in facts)
        for worker in workers:
            _ask(worker, "warm", task)
        rounds, samples = _rounds(workers, task, progress or SilentProgress())
        memory = [_ask(worker, "memory", task)["bytes"] for worker in workers]
        result = _summary(samples, memory, task, rounds, seed)
        if lengths is not None and lengths.lengths:
            asks = [partial(_command, worker) for worker in workers]
            room = partial(_room, max_ram)
            rows, shared = Lengths(asks, lengths, task, room, progress or SilentProgress()).measure()
            for side, measured in zip(result.values(), rows, strict=True):
                side |= {**measured, **shared}
    return result


def _rounds(
    workers: Sequence[_Worker], task: dict[str, Any], progress: Progress
) -> tuple[int, list[dict[str, list[float]]]]:
    """Number of rounds, and each worker's seconds by name; a second, timed warm-up tells how many rounds fit."""
    once = sum(_ask(worker, "round", task)["seconds"] for worker in workers)
    rounds = int(max(FEWEST, min(MOST, SECONDS / max(once, 1e-6))))
    samples: list[dict[str, list[float]]] = [{"prefill": [], "decode": []} for _ in workers]
    with progress.task("latency", rounds, "rounds") as bar:
        for number in range(rounds):
            order = range(len(workers)) if number % 2 == 0 else reversed(range(len(workers)))
            for i in order:
                answer = _ask(workers[i], "round", task)
                for name in ("prefill", "decode"):
                    if answer[name] is not None:
                        samples[i][name].append(answer[name])
            bar.advance()
    return rounds, samples


def _room(max_ram: int | None, workers: int) -> int:
    """Bytes left for a prompt, where the workers hold so many."""
    left = available_memory()
    return left if max_ram is None else min(left, max(max_ram - workers - resident_memory(), 0))


def _summary(
    samples: list[dict[str, list[float]]], memory: list[int], task: dict[str, Any], rounds: int, seed: int
) -> dict[str, dict[str, Any]]:
    from compress.statistics import median_ratio, quantile

    result: dict[str, dict[str, Any]] = {}
    for i, side in enumerate(("original", "candidate")):
        entry: dict[str, Any] = {"rounds": rounds, "prompt": task["prompt"], "generated": task["generated"]}
        for name in ("prefill", "decode"):
            mine = samples[i][name]
            if not mine:
                entry[name] = None
                continue
            entry[name] = {"median": quantile(mine, 0.5), "p90": quantile(mine, 0.9), "samples": samples[i][name]}
            if i:
                ratio = median_ratio(samples[0][name], samples[i][name], confidence=0.95, bootstrap=2000, seed=seed)
                entry[name] |= {"ratio": ratio.value, "lower": ratio.lower, "upper": ratio.upper}
        entry["memory"] = {"peak": memory[i]}
        if i:
            entry["memory"]["ratio"] = memory[i] / memory[0] if memory[0] else None
        result[side] = entry
    return result


class _Worker:
    """A process that answers each line of JSON with a line of JSON."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self.process = process
        self.errors = errors

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        timer = threading.Timer(PATIENCE, self.process.kill)
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
                raise ResourceError("the process that measures latency was killed", fix="it may need more memory")
            raise CompressError(f"the process that measures latency ended with status {status}: {last}")
        data: dict[str, Any] = json.loads(line)
        if "error" in data:
            if data.get("resources"):
                raise ResourceError(data["error"])
            raise CheckpointError(data["error"])
        return data

    def send(self, data: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` raises the reason
            self.process.stdin.write(json.dumps(data) + "\n")
            self.process.stdin.flush()


def _ask(worker: _Worker, what: str, task: dict[str, Any]) -> dict[str, Any]:
    return _command(worker, {"do": what, **task})


def _command(worker: _Worker, command: Mapping[str, Any]) -> dict[str, Any]:
    worker.send(dict(command))
    return worker.answer()


@contextlib.contextmanager
def _worker(settings: dict[str, Any]) -> Iterator[_Worker]:
    """Start a worker and kill it at the end. It also ends when its stdin closes."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "compress.evaluation.latency_worker", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,  # this process handles Ctrl-C
        )
        try:
            yield _Worker(process, errors)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
