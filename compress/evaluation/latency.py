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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from compress.errors import CheckpointError, CompressError, ResourceError
from compress.progress import Progress, SilentProgress

#: Tokens of the prompt, and generated tokens.
PROMPT, GENERATED = 256, 32
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
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure ``[original, candidate]`` interleaved, after a warm-up.

    Returns:
        ``original`` and ``candidate``. Each has ``prefill``, seconds for the prompt with logits of the last token only, and
        ``decode``, seconds per generated token (None for models that do not generate). Both have ``samples`` by round,
        ``median`` and ``p90``; the candidate's also ``ratio`` with one-sided 95 % bounds ``lower`` and ``upper``. ``memory``
        has the ``peak`` bytes of loading and inference beyond what the process had before (on a GPU: allocated bytes), and
        the candidate's its ``ratio``.

    Raises:
        CompressError: a worker cannot load its model, or died.
    """
    settings = {"dtype": dtype, "device": device, "threads": threads, "trust_remote_code": trust_remote_code}
    settings["ignore_auto_map"] = ignore_auto_map
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_worker({**settings, "folder": str(folder)})) for folder in folders]
        facts = [worker.answer() for worker in workers]
        positions = [f["positions"] for f in facts if f["positions"] is not None]
        prompt = min([PROMPT, *(max(p - GENERATED, 1) for p in positions)])
        task = {"seed": seed, "prompt": prompt, "vocabulary": min(f["vocabulary"] for f in facts)}
        task["generated"] = min([GENERATED, *(max(p - prompt, 1) for p in positions)])
        task["decode"] = all(f["generates"] for f in facts)
        warm = [_ask(worker, "warm", task) for worker in workers]
        # a second, timed warm-up tells how many rounds fit
        once = sum(_ask(worker, "round", task)["seconds"] for worker in workers)
        rounds = int(max(FEWEST, min(MOST, SECONDS / max(once, 1e-6))))
        samples: list[dict[str, list[float]]] = [{"prefill": [], "decode": []} for _ in workers]
        assert len(warm) == len(workers)
        with (progress or SilentProgress()).task("latency", rounds, "rounds") as bar:
            for number in range(rounds):
                order = range(len(workers)) if number % 2 == 0 else reversed(range(len(workers)))
                for i in order:
                    answer = _ask(workers[i], "round", task)
                    for name in ("prefill", "decode"):
                        if answer[name] is not None:
                            samples[i][name].append(answer[name])
                bar.advance()
        memory = [_ask(worker, "memory", task)["bytes"] for worker in workers]
    return _summary(samples, memory, task, rounds, seed)


def _summary(
    samples: list[dict[str, list[float]]], memory: list[int], task: dict[str, Any], rounds: int, seed: int
) -> dict[str, dict[str, Any]]:
    from compress.statistics import median_ratio

    result: dict[str, dict[str, Any]] = {}
    for i, side in enumerate(("original", "candidate")):
        entry: dict[str, Any] = {"rounds": rounds, "prompt": task["prompt"], "generated": task["generated"]}
        for name in ("prefill", "decode"):
            mine = sorted(samples[i][name])
            if not mine:
                entry[name] = None
                continue
            entry[name] = {"median": _quantile(mine, 0.5), "p90": _quantile(mine, 0.9), "samples": samples[i][name]}
            if i:
                ratio = median_ratio(samples[0][name], samples[i][name], confidence=0.95, bootstrap=2000, seed=seed)
                entry[name] |= {"ratio": ratio.value, "lower": ratio.lower, "upper": ratio.upper}
        entry["memory"] = {"peak": memory[i]}
        if i:
            entry["memory"]["ratio"] = memory[i] / memory[0] if memory[0] else None
        result[side] = entry
    return result


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Quantile with linear interpolation, as numpy's default."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


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
    worker.send({"do": what, **task})
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
