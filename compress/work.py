"""The work of a pass by kind, and the time it takes at rates that were measured on a machine. No torch here.

A kind of work is a model of time: the seconds for a size are a sum of terms, each a power of the sizes times a rate. The rates
come from a few measurements, see `compress.blockwise.rates`. O outputs and I inputs of a matrix.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from compress.errors import CompressError
from compress.files import read_record, write_record

#: Version of the models of time below and of the code that measures rates.
_VERSION = 8

#: Kind ▶ the terms of its time, each as exponents of (O, I). Of products, Hessians, and passes over values: for one token, row
#: or value.
#: `product`: one row times a matrix. `hessian`, `hessian_wide`: one token's part of Σ x xᵀ, summed in float64 and in float32.
#: `values`: a few operations on each value. `attention`: of one token and O channels to I others. `adam`: a step of one
#: value. `factor`, `factor_wide`: a Hessian's order and inverse factor, in float64 and in float32. `eigen`, `eigen_wide`: the
#: problem of ALPS. `inverse`: a Hessian's inverse. `obs`: a step of removing units. `nearest`, `searched`: rounding one matrix
#: without data. `low_rank`, `low_rank_tall`: factors of a matrix with O <= I, and of others. `logits`: of one logit, its
#: probability and a divergence. `adamw`: a step of one value in training. `spill`: a byte of activations written and read.
#: `calls`: a small operation. `trellis`: the codes of one matrix, beside `gptq`. `disk`: a byte written, digested, read and
#: digested again. `text`: a byte made tokens. `start`: a process with torch and transformers. `clock`: seconds that something
#: lasts. Others: solving one matrix.
TERMS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "product": ((1, 0), (0, 1), (1, 1)),
    "hessian": ((0, 1), (0, 2)),
    "hessian_wide": ((0, 2),),
    "values": ((0, 1),),
    "attention": ((1, 1),),
    "adam": ((0, 1),),
    "factor": ((0, 2), (0, 3)),
    "factor_wide": ((0, 3),),
    "eigen": ((0, 2), (0, 3)),
    "eigen_wide": ((0, 3),),
    "wanda": ((1, 1), (1, 2)),
    "sparsegpt": ((0, 1), (1, 1), (1, 2)),
    "alps": ((1, 1), (1, 2), (0, 3)),
    "gptq": ((0, 1), (1, 1), (1, 2)),
    "trellis": ((0, 1), (1, 1)),
    "quantease": ((0, 1), (1, 1), (1, 2)),
    "kronecker": ((1, 0), (0, 1), (1, 2), (2, 1)),
    "yaqa": ((0, 1), (1, 1), (1, 2), (2, 1)),
    "inverse": ((0, 2), (0, 3)),
    "obs": ((0, 1), (1, 1), (0, 2)),
    "least_squares": ((0, 2), (1, 2), (0, 3)),
    "low_rank": ((1, 2), (3, 0)),
    "low_rank_tall": ((1, 2), (0, 3)),
    "shared_matrix": ((0, 2), (1, 2), (0, 3)),
    "logits": ((0, 1),),
    "adamw": ((0, 1),),
    "spill": ((0, 1),),
    "calls": ((0, 1),),
    "nearest": ((1, 1),),
    "searched": ((1, 1),),
    "disk": ((0, 1),),
    "text": ((0, 1),),
    "start": ((0, 1),),
    "clock": ((0, 1),),
}

#: Rates of a core of 2024, which tell whether it pays to measure those of this machine.
_ROUGH: Mapping[str, tuple[float, ...]] = {
    "product": (0.0, 0.0, 2e-11), "hessian": (1e-9, 1e-11), "hessian_wide": (1e-11,), "values": (4e-10,),
    "attention": (5e-11,), "adam": (5e-9,), "factor": (2e-8, 4e-11), "factor_wide": (4e-11,), "eigen": (7e-8, 1.2e-10),
    "eigen_wide": (1.2e-10,), "wanda": (1e-8, 4e-11), "sparsegpt": (1e-5, 1.5e-8, 5e-11), "alps": (3e-7, 1e-9, 2e-10),
    "gptq": (1e-5, 1.5e-8, 5e-11), "trellis": (1e-3, 2e-6), "quantease": (7e-5, 2e-8, 1.6e-10),
    "kronecker": (2e-4, 2e-4, 0.0, 4e-10),
    "yaqa": (3e-4, 0.0, 0.0, 8e-10), "inverse": (2e-8, 5e-11), "obs": (5e-7, 1e-9, 1e-9),
    "least_squares": (1e-8, 6e-11, 2e-11), "low_rank": (6e-11, 2e-10), "low_rank_tall": (6e-11, 2e-10),
    "shared_matrix": (1e-8, 1.5e-10, 4e-11), "logits": (5e-9,), "adamw": (3e-9,), "spill": (6e-10,), "calls": (2e-6,),
    "nearest": (1e-9,), "searched": (1e-8,), "disk": (4e-9,), "text": (1.2e-6,), "start": (5.0,), "clock": (1.0,),
}  # fmt: skip


class WorkAmount(NamedTuple):
    """So many times the work of a kind at a size (O, I)."""

    kind: str
    outputs: int
    inputs: int
    times: float


@dataclass
class Work:
    """Amounts of work; times of the same kind and size are summed."""

    times: dict[tuple[str, int, int], float] = field(default_factory=dict)

    def add(self, kind: str, outputs: int, inputs: int, times: float = 1.0) -> None:
        """Add ``times`` the work of a kind at a size."""
        assert kind in TERMS, kind
        key = (kind, outputs, inputs)
        self.times[key] = self.times.get(key, 0.0) + times

    def add_all(self, other: Work, times: float = 1.0) -> None:
        """Add ``times`` all amounts of another one."""
        for (kind, outputs, inputs), count in other.times.items():
            self.add(kind, outputs, inputs, times * count)

    def amounts(self) -> Iterable[WorkAmount]:
        """The amounts."""
        return (WorkAmount(*key, count) for key, count in self.times.items())


def terms(kind: str, outputs: int, inputs: int) -> list[float]:
    """The value of each term of a kind at a size."""
    return [float(outputs**a * inputs**b) for a, b in TERMS[kind]]


@dataclass(frozen=True)
class Rates:
    """Seconds per unit of each term, by kind; see `TERMS`."""

    seconds: Mapping[str, tuple[float, ...]]

    def predict(self, work: Work) -> float:
        """The seconds that the work takes."""
        return sum(
            amount.times
            * sum(
                rate * term
                for rate, term in zip(
                    self.seconds[amount.kind], terms(amount.kind, amount.outputs, amount.inputs), strict=True
                )
            )
            for amount in work.amounts()
        )

    def by_kind(self, work: Work) -> dict[str, float]:
        """The seconds that each kind takes, the longest first."""
        result: dict[str, float] = {}
        for key, count in work.times.items():
            result[key[0]] = result.get(key[0], 0.0) + self.predict(Work({key: count}))
        return dict(sorted(result.items(), key=lambda item: -item[1]))


def with_writing(work: Work | None, count: int) -> Work | None:
    """The same work, and that of writing so many bytes; None for None."""
    if work is None:
        return None
    result = Work(dict(work.times))
    result.add("disk", 0, 1, count)
    return result


def seconds_of(work: Work | None, rates: Rates | None) -> float | None:
    """The seconds that the work takes, to a tenth; None where it or the rates are not known."""
    return None if rates is None or work is None else round(rates.predict(work), 1)


def rough_seconds(work: Work) -> float:
    """A guess of the seconds that the work takes, right to a factor of a few."""
    return Rates(_ROUGH).predict(work)


def cpu_name() -> str:
    """The name of this machine's CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _identity() -> dict[str, object]:
    from importlib.metadata import version

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "version": _VERSION,
        "cpu": cpu_name(),
        "cores": cores,
        "threads": os.environ.get("OMP_NUM_THREADS") or "default",
        "torch": version("torch"),
    }


def _place() -> Path:
    key = hashlib.sha256(json.dumps(_identity(), sort_keys=True).encode()).hexdigest()[:12]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress" / f"rates-{key}.json"


def cached_rates() -> Rates | None:
    """The rates that were measured on this machine's CPU with this number of threads; None where there are none."""
    try:
        record = read_record(_place(), "rates")
    except (CompressError, OSError):
        return None
    rows = None if record is None else record.get("seconds")
    if not isinstance(rows, dict) or {k: len(v) for k, v in rows.items()} != {k: len(v) for k, v in TERMS.items()}:
        return None
    return Rates({kind: tuple(float(x) for x in row) for kind, row in rows.items()})


def keep_rates(rates: Rates) -> None:
    """Write rates for `cached_rates`; a cache folder that cannot be written is left."""
    path = _place()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, "rates", {"machine": _identity(), "seconds": {k: list(v) for k, v in rates.seconds.items()}})
    except (CompressError, OSError):
        return


def computes_on_cpu(device: str) -> bool:
    """Whether a recipe's device is this machine's CPU, told without torch by the driver of NVIDIA's."""
    return device == "cpu" or (device == "auto" and not Path("/proc/driver/nvidia").exists())


def minutes_text(seconds: float | None) -> str:
    """A time to read: ``40 s``, ``14 min`` or ``2 h 10 min``; ``–`` for None."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
