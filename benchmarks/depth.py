"""Choice of blocks to remove: `make bench-depth [MODEL= TRAIN= HELDOUT= ARGS=]`, a section of docs/benchmarks.md.

Ways: `race`, the pass's own choice; `greedy`, what greedy removal on all 32 samples takes, also on kept hidden states, without
groups (after `race` it goes on from its trials, and its times include them); `influence`, the blocks of least influence
(ShortGPT); `angle`, the contiguous group of least angular distance (arXiv 2403.17887). For each: CPU and wall time of the
choice with loading, samples tried, KL without the blocks on the calibration samples, and the scores of benchmarks/scoring.py
without repair.

What is done is kept in --results. A run that was stopped, or that --seconds ends, goes on there and adds up its times.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page, scoring  # noqa: E402
from compress.progress import SilentProgress  # noqa: E402

#: Samples at a time of `greedy`.
ROUND = 4
WAYS = ("race", "greedy", "influence", "angle")


class _Stopped(Exception):
    pass


class _Clock(SilentProgress):
    """Adds up the time of a choice in a file, also over several runs."""

    def __init__(self, file: Path, until: float) -> None:
        self._file, self._until = file, until
        self._before = json.loads(file.read_text()) if file.exists() else {"cpu": 0.0, "wall": 0.0}
        self._cpu, self._wall = _cpu(), time.perf_counter()

    def task(self, title: str, total: int | None = None, unit: str = "tensors") -> Any:
        return self

    def __enter__(self) -> _Clock:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.seconds()
        if time.perf_counter() > self._until:
            raise _Stopped

    def seconds(self) -> dict[str, float]:
        """CPU and wall seconds so far."""
        spent = {"cpu": _cpu() - self._cpu, "wall": time.perf_counter() - self._wall}
        total = {key: self._before[key] + value for key, value in spent.items()}
        self._file.write_text(json.dumps(total))
        return total


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def choice(way: str, model: str, samples: Any, count: int, folder: Path, clock: _Clock) -> dict[str, Any]:
    """The blocks that a way removes, samples that it tried, and their times."""
    from compress.checkpoint.open import open_checkpoint
    from compress.sensitivity import depth, depth_states
    from compress.sensitivity.block_influence import block_influence
    from compress.workspace import Workspace

    checkpoint, work = open_checkpoint(model), Workspace(folder / way)
    some = samples.first(depth.TRIAL_SAMPLES)
    on = {"dtype": "float32", "device": "cpu"}
    tried = 0
    if way == "race":
        options = depth.DepthOptions("float32", "cpu")
        result = depth.choose_blocks(checkpoint, samples, count, options, workspace=work, progress=clock)
        blocks = result.order
        tried = sum(t.samples for step in result.steps for t in step.values())
        tried += sum(t.samples for group, t in result.groups.items() if group != tuple(sorted(blocks)))
    elif way == "greedy":
        blocks, tried = greedy(depth_states.KeptStates(checkpoint, some, work.path, **on), count, work, clock)
    elif way == "influence":
        scores = block_influence(checkpoint, some, progress=clock, **on)
        blocks = sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count]
    else:
        states = depth_states.KeptStates(checkpoint, some, folder / way, **on)
        rows = range(len(some.ids))
        starts = range(states.depth - count + 1)
        angles = states.angles([(i, i + count) for i in starts], rows)
        start = min(starts, key=angles.__getitem__)
        blocks = list(range(start, start + count))
        states.close()
    return {"blocks": blocks, "tried": tried, **clock.seconds()}


def greedy(states: Any, count: int, work: Any, clock: _Clock) -> tuple[list[int], int]:
    """The blocks that greedy removal takes on all samples, and the samples that were tried.

    A set leaves once its loss on some samples, the rest taken for 0, is above that of another one on all of them.

    Args:
        work: its trials; those of a race that went before are used.
    """
    from compress.workspace import Workspace

    raced = Workspace(work.path.parent / "race").read_json("trials") or {}
    seen = {**{k: v[: len(v) // ROUND * ROUND] for k, v in raced.items()}, **(work.read_json("all") or {})}
    known: dict[tuple[int, ...], list[float]] = {tuple(map(int, k.split("-"))): v for k, v in seen.items() if v}
    gone: list[int] = []

    def sure(blocks: tuple[int, ...]) -> float:
        return sum(v * n for v, n in zip(known[blocks], states.counts, strict=False))

    for _ in range(count):
        base = tuple(sorted(gone))
        sets = {tuple(sorted((*gone, i))): i for i in range(states.depth) if i not in gone}
        best = float("inf")
        for ahead in (True, False):  # first the one that leads after the first samples
            for begin in range(0, len(states.counts), ROUND):
                racing = [s for s in sets if len(known.get(s, ())) <= begin and (s not in known or sure(s) < best)]
                if begin and ahead:
                    racing = [s for s in racing if s == min(sets, key=lambda s: sum(known[s][:ROUND]))]
                rows = range(begin, min(begin + ROUND, len(states.counts)))
                for blocks, values in zip(racing, states.losses(racing, rows, base) if racing else (), strict=True):
                    known.setdefault(blocks, []).extend(values)
                work.write_json("all", {"-".join(map(str, k)): v for k, v in known.items()})
                clock.advance()
            best = min((sure(s) for s in sets if len(known[s]) == len(states.counts)), default=best)
        gone.append(sets[min((s for s in sets if len(known[s]) == len(states.counts)), key=lambda s: (sure(s), s))])
    states.close()
    return gone, sum(map(len, known.values()))


def divergence(model: str, samples: Any, blocks: list[int], folder: Path) -> float:
    """KL without those blocks, nats per token, on the calibration samples that choices are made on."""
    from compress.checkpoint.open import open_checkpoint
    from compress.sensitivity import depth, depth_states

    some = samples.first(depth.TRIAL_SAMPLES)
    states = depth_states.KeptStates(open_checkpoint(model), some, folder, dtype="float32", device="cpu")
    values = states.losses([tuple(sorted(blocks))], range(len(some.ids)), ())[0]
    states.close()
    return sum(v * n for v, n in zip(values, states.counts, strict=True)) / sum(states.counts)


def scored(model: str, blocks: list[int], texts: Callable[[], scoring.HeldOut]) -> list[str]:
    """Held-out scores without those blocks, entries of a row."""
    import compress

    with tempfile.TemporaryDirectory() as scratch:
        gone: dict[str, Any] = {"layers": sorted(blocks), "compensation": "none", "importance": "magnitude"}
        compress.apply("prune_structured", model, f"{scratch}/out", **gone)
        return texts().cells([texts().score(f"{scratch}/out")])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--train", default=str(ROOT / "examples/text/train.txt"))
    scoring.options(parser)
    parser.add_argument("--count", type=int, default=1, help="blocks to remove")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--results", type=Path, default=ROOT / "out/bench-depth")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many, to go on later")
    parser.add_argument("--section", default="depth", help="of docs/benchmarks.md; '-' prints only")
    args = parser.parse_args()
    until = time.perf_counter() + args.seconds
    folder = args.results / f"{Path(args.model).name}-{args.count}"
    folder.mkdir(parents=True, exist_ok=True)
    samples = scoring.calibration_samples(args.model, args.train, args.samples)
    texts = cache(lambda: scoring.held_out(args))

    def kept(name: str, compute: Callable[..., Any], *of: Any) -> Any:
        file = folder / f"{name}.json"
        if not file.exists():
            if time.perf_counter() > until:
                raise _Stopped
            file.write_text(json.dumps(compute(*of)))
            print(name, file.read_text(), flush=True)
        return json.loads(file.read_text())

    try:
        rows = []
        note = kept("note", lambda: texts().note())
        for way in args.ways:
            times = folder / f"{way}.clock"
            if way == "greedy" and not times.exists() and (folder / "race.clock").exists():
                shutil.copy(folder / "race.clock", times)
            clock = _Clock(times, until)
            row = kept(way, choice, way, args.model, samples, args.count, folder, clock)
            blocks = row["blocks"]
            name = "-".join(map(str, sorted(blocks)))
            kl = kept(f"kl-{name}", divergence, args.model, samples, blocks, folder / "kl")
            scores = kept(f"scores-{name}", scored, args.model, blocks, texts)
            tried = f"{row['tried']:,}" if row["tried"] else "–"
            numbers = ", ".join(map(str, blocks))
            rows.append([way, numbers, tried, f"{row['cpu']:.0f}", f"{row['wall']:.0f}", f"{kl:.4f}", *scores])
    except _Stopped:
        print("stopped; the same command goes on")
        return
    shutil.rmtree(folder / "kl", ignore_errors=True)
    page.deliver(
        args.section,
        [
            f"## Choice of {args.count} blocks of {page.model_name(args.model)}",
            "",
            f"`{page.command('bench-depth', parser, args)}`: {page.environment()} {args.samples} × {scoring.WINDOW} "
            f"calibration tokens, of which the choice uses 32. {note} Float32, no repair. "
            "Blocks in order of removal. `tried`: samples × sets of blocks. `benchmarks/depth.py` describes the ways.",
            "",
            *page.table(["way", "blocks", "tried", "CPU s", "wall s", "KL, calibration", *scoring.COLUMNS], rows),
        ],
    )


if __name__ == "__main__":
    main()
