"""What campaigns over scenes share: options, worker processes, and counts in the ledger."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.campaigns import forked, ledger, scenes


def options(name: str, doc: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of a campaign's command line."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.campaigns.{name}", description=(doc or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="cases up to which this seed goes")
    parser.add_argument("--seed", type=int, default=time.time_ns() // 1000 % 2**31, help="default: from the clock")
    parser.add_argument("--resume", action="store_true", help="go on with the newest seed of this commit in the ledger")
    parser.add_argument("--scene", choices=sorted(scenes.RECIPES), help="default: all of them by turns")
    parser.add_argument("--case", type=int, help="try this case alone, and write nothing to the ledger")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--no-ledger", action="store_true", help="write nothing to docs/reliability.json")
    chosen = parser.parse_args(arguments)
    if chosen.resume:
        commit = ledger.commit()
        begun = [e.seed for e in ledger.read() if (e.campaign, e.commit) == (name, commit) and e.cases < chosen.count]
        chosen.seed = begun[-1] if begun else chosen.seed
    return chosen


def over_scenes(
    name: str,
    chosen: argparse.Namespace,
    draw: Callable[[Mapping[str, scenes.Scene], random.Random], Any],
    check: Callable[[scenes.Scene, Any], str | None],
) -> int:
    """Try cases, print the ones that fail, add all to the ledger. Returns 1 if one failed."""
    label = name if chosen.scene is None else f"{name} {chosen.scene}"
    forked.preload()
    entry = ledger.find(label, ledger.commit(), chosen.seed) if not chosen.no_ledger else None
    first = entry.cases if entry is not None else 0
    numbers = [chosen.case] if chosen.case is not None else list(range(first, chosen.count))
    print(f"{label}: seed {chosen.seed}, cases {numbers[0] if numbers else first} to {chosen.count}", flush=True)
    deadline = time.monotonic() + 60 * (chosen.minutes or 1e6)
    names = [chosen.scene] if chosen.scene else sorted(scenes.RECIPES)
    failures = 0
    results = _results(numbers, names, chosen.seed, draw, check, max(1, min(chosen.jobs, len(numbers))), deadline)
    for number, text, wrong, cpu in results:
        if wrong is not None:
            failures += 1
            print(f"case {number} of seed {chosen.seed}: {text}: {wrong}", flush=True)
        if entry is not None and chosen.case is None:
            entry.count(["failed" if wrong else "whole"], [f"{text}: {wrong}"] if wrong else [], cpu)
            ledger.save(entry)
    print(f"{label}: {failures} failed", flush=True)
    return int(failures > 0)


def _results(
    numbers: Sequence[int],
    names: Sequence[str],
    seed: int,
    draw: Callable[[Mapping[str, scenes.Scene], random.Random], Any],
    check: Callable[[scenes.Scene, Any], str | None],
    jobs: int,
    deadline: float,
) -> Any:
    """(number, case, what went wrong, CPU seconds), in the order of numbers, from ``jobs`` processes with scenes of their own."""
    context = multiprocessing.get_context("fork")
    queues = [context.Queue() for _ in range(jobs)]
    workers = [
        context.Process(target=_work, args=(numbers[job::jobs], names, seed, draw, check, queue, deadline))
        for job, queue in enumerate(queues)
    ]
    for worker in workers:
        worker.start()
    try:
        for index in range(len(numbers)):
            row = queues[index % jobs].get()
            if row is None:  # out of time
                return
            if isinstance(row, BaseException):
                raise row
            yield row
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _work(
    numbers: Sequence[int],
    names: Sequence[str],
    seed: int,
    draw: Callable[[Mapping[str, scenes.Scene], random.Random], Any],
    check: Callable[[scenes.Scene, Any], str | None],
    queue: Any,
    deadline: float,
) -> None:
    """One process: build the scenes, try every case, say how it went; None at the end."""
    place = scenes.place()
    try:
        built = {name: scenes.build(name, place) for name in names}
        before = {name: scenes.contents(scene.inputs) for name, scene in built.items()}
        for number in numbers:
            if time.monotonic() > deadline:
                break
            start = os.times()
            case = draw(built, random.Random(f"{seed}:{number}"))
            scene = built[case.scene]
            wrong = check(scene, case)
            if wrong is None and scenes.contents(scene.inputs) != before[case.scene]:
                wrong = "an input was changed"
            end = os.times()
            queue.put((number, repr(case), wrong, sum(end[:4]) - sum(start[:4])))
        queue.put(None)
    except BaseException as error:
        queue.put(error)
    finally:
        queue.close()
        queue.join_thread()
        shutil.rmtree(place, ignore_errors=True)
