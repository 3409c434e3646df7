"""Many runs in one process: the same recipe gives the same bytes each time, and nothing piles up in memory or on the disk.

    python -m tests.campaigns.soak --count 60 [--seed N]

Recipes are drawn with repeats; some runs begin anew, some find their result there, some replace another's. Open files and
threads must not grow at all after the first ten runs, and memory by no more than 64 MiB.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.campaigns import campaign, forked, ledger, scenes

#: Runs that fill caches, and bytes that memory may grow by after them.
WARM, GROWTH = 10, 64 << 20
PASSES: list[list[Any]] = [
    [scenes.PRUNE],
    [scenes.PRUNE, scenes.INT4],
    [scenes.PRUNE, scenes.DISTILL],
    [scenes.SPARSE, {"cast": {"weights": "int8"}}],
    [{"share": {"codebook_bits": 4}}],
    [{"factorize": {"keep_parameters": "70%", "reconstruction_epochs": 1}}],
    [{"cast": {"weights": "bf16"}}],
]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def handles() -> tuple[int, int]:
    """Open files and threads of this process, without the one monitor that tqdm starts in a process and keeps."""
    threads = [thread for thread in threading.enumerate() if thread.name != "tqdm_monitor"]
    return len(list(Path("/proc/self/fd").iterdir())), len(threads)


def main(arguments: list[str] | None = None) -> int:
    """Run the soak."""
    chosen = campaign.options("soak", __doc__, arguments)
    forked.preload()
    place = scenes.place()
    try:
        return _soak(chosen, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _soak(chosen: Any, place: Path) -> int:
    import compress

    scene = scenes.build("chain", place)
    base = json.loads(scene.recipe.read_text())
    known: dict[int, dict[str, str]] = {}
    entry = ledger.Entry("soak", ledger.commit(), chosen.seed)
    lot, start, after_warm = random.Random(chosen.seed), time.monotonic(), (0, (0, 0))
    print(f"soak: seed {chosen.seed}, {chosen.count} runs", flush=True)
    for number in range(chosen.count):
        if chosen.minutes and time.monotonic() - start > 60 * chosen.minutes:
            break
        index, fresh = lot.randrange(len(PASSES)), lot.random() < 0.3
        cpu, wrong = time.process_time(), []
        result = compress.run({**base, "passes": PASSES[index]}, fresh=fresh, publish_anyway=True)
        found = scenes.digests(result.checkpoint)
        if found != known.setdefault(index, found):
            wrong.append(f"recipe {index} gave other bytes than before")
        if left := scenes.leftovers(scene):
            wrong.append(f"left behind: {left}")
        if number == WARM:
            after_warm = (resident(), handles())
        elif number > WARM:
            wrong += _growth(*after_warm)
        entry.count([str(result.exit_status)], wrong, time.process_time() - cpu)
        for text in wrong:
            print(f"run {number} of seed {chosen.seed}, recipe {index}: {text}", flush=True)
    print(
        f"soak: {entry.cases} runs, {len(entry.failures)} failures, {resident() / 2**20:.0f} MiB at the end", flush=True
    )
    if not chosen.no_ledger:
        ledger.save(entry)
    return int(bool(entry.failures))


def _growth(memory: int, before: tuple[int, int]) -> list[str]:
    wrong = []
    if (grown := resident() - memory) > GROWTH:
        wrong.append(f"memory has grown by {grown / 2**20:.0f} MiB")
    if (now := handles()) > before:
        threads = ", ".join(t.name for t in threading.enumerate())
        wrong.append(f"(open files, threads) were {before}, are {now}: {threads}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
