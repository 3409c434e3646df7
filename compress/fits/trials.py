"""TrialRunner of a search: each a process of its own, its result kept beside the output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError, ResourceError
from compress.files import read_record, remove, write_record
from compress.passes.work import SampleSize
from compress.pipeline.fingerprint import fingerprint, versions

_TRIAL = "compress.fit.trial/1"


@dataclass(frozen=True)
class Tried:
    """The measurements of a trial.

    Attributes:
        divergences: of each held-out sample, nats per token; empty where a pass refused, with ``refused``, why.
    """

    bytes: int
    divergences: tuple[float, ...]
    seconds: float
    refused: str | None = None

    @property
    def divergence(self) -> float:
        """The mean."""
        return sum(self.divergences) / len(self.divergences)


@dataclass
class TrialRunner:
    """Runs trials, or reads what they measured before.

    Attributes:
        path: folder of the search. base: the recipe's keys but passes and output. identity: of the model and the samples.
        samples: file of token ids, `calibration` and `held_out`. device: of the computation.
        held_out: number and length of the samples that trials are measured on. made: number of trials that were not read.
        own: whether `calibration` holds the samples that the recipe itself draws, all of them.
    """

    path: Path
    base: Mapping[str, Any]
    identity: str
    samples: Path
    device: str
    held_out: SampleSize
    made: int = 0
    own: bool = False

    @property
    def finished(self) -> Path:
        """Stages of finalists, which the run of the result takes."""
        return self.path / "finished"

    def run(self, passes: list[dict[str, Any]], count: int, *, finalist: bool = False) -> Tried:
        """Measure what passes cost, calibrated on ``count`` samples.

        Args:
            finalist: with the samples of the recipe itself, where ``own``, and its stages are kept.

        Raises:
            ResourceError: the process was killed or ran out of memory. CompressError: it ended in another way.
        """
        record = self._record(passes, count)
        if (known := read_record(record, _TRIAL)) is None:
            known = self._run(passes, count, record.stem, finalist=finalist and self.own)
            record.parent.mkdir(parents=True, exist_ok=True)
            write_record(record, _TRIAL, known)
            self.made += 1
        if "refused" in known:
            return Tried(0, (), known["seconds"], known["refused"])
        return Tried(known["bytes"], tuple(known["divergences"]), known["seconds"])

    def measured(self, passes: list[dict[str, Any]], count: int) -> bool:
        """Whether an earlier search has run this trial."""
        return self._record(passes, count).exists()

    def recipe(self, passes: list[dict[str, Any]], count: int, output: Path) -> dict[str, Any]:
        """The keys of a trial's recipe."""
        data = {k: v for k, v in self.base["data"].items() if k == "training"}
        data["calibration"] = {"files": [str(self.samples)], "field": "calibration", "samples": count}
        return {**self.base, "data": data, "passes": passes, "output": str(output), "evaluate": []}

    def _record(self, passes: list[dict[str, Any]], count: int) -> Path:
        key = fingerprint([self.identity, passes, count, versions()])[:24]
        return self.path / "trials" / f"{key}.json"

    def _run(self, passes: list[dict[str, Any]], count: int, key: str, *, finalist: bool) -> dict[str, Any]:
        work = self.path / "work" / key
        for other in work.parent.glob("*") if work.parent.exists() else ():
            if other != work:  # of a trial that was stopped and is asked for no more
                remove(other)
        work.mkdir(parents=True, exist_ok=True)
        job, result = work / "job.json", work / "result.json"
        recipe = self.recipe(passes, count, work / "out")
        if finalist:
            recipe["data"] = {k: v for k, v in self.base["data"].items() if k != "evaluation"}
        shared = str(self.finished) if finalist else None
        asked = {"recipe": recipe, "samples": str(self.samples), "device": self.device, "shared": shared}
        job.write_text(json.dumps(asked))
        result.unlink(missing_ok=True)
        done = subprocess.Popen(
            [sys.executable, "-m", "compress.fits.trial", str(job), str(result)],
            stdin=subprocess.PIPE,  # closed when this process ends, however it does
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert done.stderr is not None
            errors = done.stderr.read()
            done.wait()
        except BaseException:
            done.kill()
            done.wait()
            raise
        if not result.exists():
            raise _ended(done.returncode, errors)
        measured: dict[str, Any] = json.loads(result.read_text())
        remove(work)
        return measured


def _ended(status: int, errors: str) -> CompressError:
    """The error for a trial without a result."""
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return ResourceError("a trial was killed, probably for its memory", fix="set max_ram, or leave families out")
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), f"status {status}")
    if "MemoryError" in errors or os.strerror(12) in errors:
        return ResourceError(f"a trial ran out of memory: {last}", fix="set max_ram, or leave families out")
    return CompressError(f"a trial ended with an error: {last}")
