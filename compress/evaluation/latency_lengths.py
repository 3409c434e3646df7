"""Cost of two models by length of the prompt, measured in turns; see `latency`, which owns the processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from compress.architectures.cache import cache_values
from compress.evaluation import latency_fit
from compress.evaluation.latency_settings import LatencySettings
from compress.formatting import format_bytes
from compress.progress import Progress
from compress.spec.spec import Spec
from compress.statistics import median_ratio, quantile

#: Asks a worker: a command ▶ its answer.
Ask: TypeAlias = Callable[[Mapping[str, Any]], dict[str, Any]]
#: Rounds at each length: as many as fit into ``SECONDS``, within these bounds.
SECONDS, FEWEST, MOST = 8.0, 10, 40
#: Tokens of the first prompt, from whose memory that of longer ones is bounded.
_FIRST = 64
_STOCK = "stock"


@dataclass
class Lengths:
    """Measures two models at several lengths.

    Attributes:
        workers: the original's process, the candidate's.
        task: ``vocabulary``, ``seed``, ``decode`` (whether both generate).
        room: resident bytes of both workers ▶ bytes that are left for a prompt.
    """

    workers: Sequence[Ask]
    settings: LatencySettings
    task: Mapping[str, Any]
    room: Callable[[int], int]
    progress: Progress
    _peaks: dict[int, int] = field(default_factory=dict)
    _left: int = 0

    def measure(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """For each model its ``lengths`` (a row each), ``fit`` and ``path_fits``; and what both share: ``not_tried``."""
        lengths = self.settings.lengths or ()
        facts = [worker({"do": "paths"}) for worker in self.workers]
        tables = [fact["table"] for fact in facts if fact["table"] is not None]
        sides: list[dict[str, Any]] = [{"lengths": [], "fit": None} for _ in facts]
        not_tried: list[dict[str, Any]] = []
        with self.progress.task("latency by length", len(lengths), "lengths") as bar:
            for length in lengths:
                needed = self._needed(length)
                if needed >= self._left or not_tried:
                    reason = f"may need {format_bytes(needed)} of memory, {format_bytes(self._left)} are left"
                    not_tried.append({"length": length, "reason": reason})
                else:
                    depth = min(length, *(table - self.settings.generated for table in tables)) if tables else length
                    for side, row in zip(sides, self._at(length, depth, facts), strict=True):
                        side["lengths"].append(row)
                bar.advance(note=f"{length:,} tokens")
        for side in sides:
            side["fit"] = _fitted([row["prefill"] for row in side["lengths"]], side["lengths"], self.task["seed"])
            ways = [{path["path"]: path["prefill"] for path in row["paths"]} for row in side["lengths"]]
            side["path_fits"] = [
                {"path": path, "fit": _fitted([way[path] for way in ways], side["lengths"], self.task["seed"])}
                for path in (ways[0] if ways else ())
            ]
        return sides, {"not_tried": not_tried}

    def _needed(self, length: int) -> int:
        """Upper bound of the bytes that a prompt takes: memory grows at most with the square of its length.

        Shorter prompts are read, each twice as long as the last, until the bound is known to fit or one is half as long.
        """
        tried = max(self._peaks, default=min(_FIRST, length))
        while True:
            if tried not in self._peaks:
                self._probe(tried)
            needed = self._peaks[tried] * max(1, length / tried) ** 2
            if needed < self._left or 2 * tried >= length:
                return int(needed)
            tried *= 2

    def _probe(self, length: int) -> None:
        """Read a prompt of that length with every model, to see how much memory it takes."""
        self._note(length, [self._ask(worker, length, length, _STOCK, 0) for worker in self.workers])

    def _note(self, length: int, answers: Sequence[Mapping[str, Any]]) -> None:
        self._peaks[length] = max(answer["peak"] for answer in answers)
        free = [answer["free"] for answer in answers if answer["free"] is not None]
        self._left = min(free) if free else self.room(sum(answer["resident"] for answer in answers))

    def _ask(self, worker: Ask, length: int, depth: int, path: str, generated: int) -> dict[str, Any]:
        command = {"do": "length", "length": length, "depth": depth, "path": path, "generated": generated}
        return worker({**command, "vocabulary": self.task["vocabulary"], "seed": self.task["seed"]})

    def _at(self, length: int, depth: int, facts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A row for each model."""
        generated = self.settings.generated if self.task["decode"] and depth > 0 else 0
        warm = [self._ask(worker, length, depth, _STOCK, generated) for worker in self.workers]
        self._note(length, warm)
        once = sum(a["prefill"][0] + generated * (a["decode"] or [0])[0] for a in warm)
        rounds = self.settings.rounds or int(max(FEWEST, min(MOST, SECONDS / max(once, 1e-6))))
        taken: list[dict[str, list[dict[str, Any]]]] = [{path: [] for path in fact["paths"]} for fact in facts]
        for number in range(rounds):
            order = range(len(self.workers))
            for i in order if number % 2 == 0 else reversed(order):
                for path in facts[i]["paths"]:
                    count = generated if path == _STOCK else 0
                    taken[i][path].append(self._ask(self.workers[i], length, depth, path, count))
        return [
            self._row(length, depth, generated, taken, side, max(a["peak"] for a in (warm[side], *taken[side][_STOCK])))
            for side in range(len(facts))
        ]

    def _row(
        self,
        length: int,
        depth: int,
        generated: int,
        taken: Sequence[Mapping[str, Sequence[Mapping[str, Any]]]],
        side: int,
        peak: int,
    ) -> dict[str, Any]:
        """The row of one model: ``side`` 0 is the original, which ratios compare with."""
        base, mine, seed = taken[0][_STOCK], taken[side], self.task["seed"]
        before = base if side else None
        row: dict[str, Any] = {"length": length, "generated": generated, "rounds": len(base)}
        row["prefill"] = _timing("prefill", mine[_STOCK], before, seed)
        row["decode"] = _timing("decode", mine[_STOCK], before, seed) if generated else None
        row["depth"] = depth
        row["memory"] = {"peak": peak}
        row["cache"] = mine[_STOCK][0]["cache"]
        row["paths"] = [
            {"path": path, "prefill": _timing("prefill", answers, base, seed)}
            for path, answers in mine.items()
            if path != _STOCK
        ]
        return row


def _timing(
    name: str, mine: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] | None, seed: int
) -> dict[str, Any]:
    """Median, 90th percentile and samples of wall seconds, and of CPU seconds in ``cpu``; ratios where there is a before."""
    clocks = []
    for clock in range(len(mine[0][name])):
        samples = [answer[name][clock] for answer in mine]
        timing: dict[str, Any] = {"median": quantile(samples, 0.5), "p90": quantile(samples, 0.9), "samples": samples}
        if before is not None:
            other = [answer[name][clock] for answer in before]
            ratio = median_ratio(other, samples, confidence=0.95, bootstrap=2000, seed=seed)
            timing |= {"ratio": ratio.value, "lower": ratio.lower, "upper": ratio.upper}
        clocks.append(timing)
    return {**clocks[0], "cpu": clocks[1] if len(clocks) > 1 else None}


def _fitted(timings: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """The fit of timings at the rows' lengths: of CPU seconds where there are any, which other processes change least."""
    cpu = all(timing["cpu"] is not None for timing in timings)
    samples = [(timing["cpu"] if cpu else timing)["samples"] for timing in timings]
    return {"clock": "cpu" if cpu else "wall", **latency_fit.fit([row["length"] for row in rows], samples, seed)}


def with_planned(latency: dict[str, Any], spec: Spec) -> dict[str, Any]:
    """The latency with the ``planned`` numbers of the cache beside those counted; None where headers do not tell."""
    for row in latency.get("lengths") or ():
        if row["cache"] is not None:
            row["cache"]["planned"] = cache_values(spec, row["length"])
    return latency
