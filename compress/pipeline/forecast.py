"""How long a run takes: predicted from the work of its passes at this machine's rates, then corrected by what stages took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from compress.planning import PlannedStage
from compress.progress import Progress, ProgressTask
from compress.work import Rates, cached_rates, computes_on_cpu, keep_rates, minutes_text, rough_seconds

#: Seconds that a stage must take, by a rough guess, for this machine to be measured first.
_WORTH = 60.0
#: Seconds between two lines on what is left of the run.
_EVERY = 60.0
#: Units of a task that must be done before its own pace counts.
_UNITS = 2


def predicted_seconds(
    stages: Sequence[PlannedStage], device: str, dtype: str, progress: Progress
) -> list[float | None]:
    """The seconds that each stage takes; None where the work is not known, or its rates.

    Measures this machine where a stage takes long and an earlier measurement is not there.
    """
    works = [None if any(p.work is None for p in s.passes) else [p.work for p in s.passes if p.work] for s in stages]
    if not computes_on_cpu(device) or dtype != "float32" or all(work is None for work in works):
        return [None] * len(stages)
    rates = cached_rates()
    if rates is None:
        if max(sum(map(rough_seconds, work)) for work in works if work is not None) < _WORTH:
            return [None] * len(stages)
        rates = _measured(progress)
    return [None if work is None else sum(map(rates.predict, work)) for work in works]


def _measured(progress: Progress) -> Rates:
    from compress.blockwise.rates import measure_rates

    rates = measure_rates(progress)
    keep_rates(rates)
    return rates


class Forecast:
    """Progress that also tells what is left of the run's stages.

    Args:
        inner: receives everything, and lines on the time. predicted: seconds of the stages that will be computed, by number
            from 1; None where it is not known.
    """

    def __init__(
        self, inner: Progress, predicted: dict[int, float | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._inner, self._predicted, self._clock = inner, predicted, clock
        self._now, self._begun, self._shown = 0, 0.0, 0.0
        self._expected = self._taken = 0.0

    def stage(self, index: int, total: int, title: str) -> None:
        """Begin a stage; of one whose time is known, say how long it takes."""
        self._end()
        self._inner.stage(index, total, title)
        self._now, self._begun = index, self._clock()
        self._shown = self._begun
        if (seconds := self._predicted.get(index)) is not None and seconds >= _EVERY / 2:
            rest = self._text(self._pace() * seconds + self._later())
            self._inner.message(f"about {minutes_text(self._pace() * seconds)}{rest}")

    def task(self, title: str, total: int | None = None, unit: str = "tensors") -> ProgressTask:
        """A task of the inner progress, whose advance may say what is left."""
        return _Watched(self, self._inner.task(title, total, unit), total if unit == "blocks" else None)

    def message(self, text: str) -> None:
        """A line of the inner progress."""
        self._inner.message(text)

    def left(self, begun: float, done: int, total: int | None) -> float | None:
        """Seconds that are left of the stages; None where it is not known of the present one.

        Of a task over blocks that has done a few, its pace counts in the place of the prediction, unless that says more.
        """
        seconds = self._predicted.get(self._now)
        now = self._clock()
        if seconds is None:
            return None
        rest = max(0.0, self._pace() * seconds - (now - self._begun))
        if total is not None and done >= _UNITS:
            rest = (now - begun) / done * (total - done)
        return rest + self._later()

    def tell(self, begun: float, done: int, total: int | None) -> None:
        """Say from time to time what is left."""
        if self._clock() - self._shown < _EVERY:
            return
        self._shown = self._clock()
        if (left := self.left(begun, done, total)) is not None:
            self._inner.message(f"about {minutes_text(left)} left of the stages{self._but()}")

    def _pace(self) -> float:
        """Seconds that finished stages took over those predicted of them; 1 without such."""
        return self._taken / self._expected if self._expected else 1.0

    def _later(self) -> float:
        """Seconds of the stages after this one that are known."""
        return self._pace() * sum(s for i, s in self._predicted.items() if i > self._now and s is not None)

    def _but(self) -> str:
        unknown = any(s is None for i, s in self._predicted.items() if i > self._now)
        return ", without those whose time is not known" if unknown else ""

    def _text(self, seconds: float) -> str:
        alone = all(i <= self._now for i in self._predicted)
        return "" if alone else f", {minutes_text(seconds)} for all stages{self._but()}"

    def _end(self) -> None:
        """Learn from the stage that has ended."""
        if (seconds := self._predicted.pop(self._now, None)) is not None:
            self._expected += seconds
            self._taken += self._clock() - self._begun


class _Watched:
    """A task whose advance is also seen by the forecast."""

    def __init__(self, forecast: Forecast, inner: ProgressTask, total: int | None) -> None:
        self._forecast, self._inner, self._total = forecast, inner, total
        self._begun, self._done, self._first = forecast._clock(), 0, True

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count units; those of an earlier run, which come first and without a note, take no time."""
        self._inner.advance(steps, note)
        if not note and self._total is not None and not self._done:
            self._total -= steps
        else:
            self._done += steps
        self._forecast.tell(self._begun, self._done, self._total)

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)
