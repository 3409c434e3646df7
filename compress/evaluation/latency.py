"""Prefill time, decode time and memory of two checkpoints, measured in turns.

Each model is in its own process (`latency_worker`), so neither warms caches or fills memory for the other. Only one works at a
time, in alternating order.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from compress.checkpoint.sidecars import LinkedFolder
from compress.evaluation.latency_lengths import Lengths
from compress.evaluation.latency_settings import GENERATED, PROMPT, LatencySettings
from compress.evaluation.worker import Worker, in_turns, started
from compress.memory import available_memory, resident_memory
from compress.progress import Progress, SilentProgress


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
        samples = in_turns(workers, {"do": "round", **task}, "latency", progress or SilentProgress())
        memory = [_ask(worker, "memory", task)["bytes"] for worker in workers]
        result = _summary(samples, memory, task, seed)
        if lengths is not None and lengths.lengths:
            asks = [partial(_command, worker) for worker in workers]
            room = partial(_room, max_ram)
            rows, shared = Lengths(asks, lengths, task, room, progress or SilentProgress()).measure()
            for side, measured in zip(result.values(), rows, strict=True):
                side |= {**measured, **shared}
    return result


def _room(max_ram: int | None, workers: int) -> int:
    """Bytes left for a prompt, where the workers hold so many."""
    left = available_memory()
    return left if max_ram is None else min(left, max(max_ram - workers - resident_memory(), 0))


def _summary(
    samples: list[dict[str, list[float]]], memory: list[int], task: dict[str, Any], seed: int
) -> dict[str, dict[str, Any]]:
    from compress.statistics import median_ratio, quantile

    result: dict[str, dict[str, Any]] = {}
    for i, side in enumerate(("original", "candidate")):
        entry: dict[str, Any] = {
            "rounds": len(samples[i]["prefill"]),
            "prompt": task["prompt"],
            "generated": task["generated"],
        }
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


def _ask(worker: Worker, what: str, task: dict[str, Any]) -> dict[str, Any]:
    return _command(worker, {"do": what, **task})


def _command(worker: Worker, command: Mapping[str, Any]) -> dict[str, Any]:
    worker.send(dict(command))
    return worker.answer()


def _worker(settings: dict[str, Any]) -> AbstractContextManager[Worker]:
    """A process that times a model in transformers."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "compress.evaluation.latency_worker", json.dumps(settings)]
    return started(command, environment, "latency")
