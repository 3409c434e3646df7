"""How long a run takes: predicted from the work of its parts at this machine's rates, then corrected by what stages took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from compress.planning import Plan, PlannedStage
from compress.progress import Progress, ProgressTask
from compress.work import Work, cached_rates, computes_on_cpu, minutes_text, rough_seconds

#: Seconds that a stage must take, by a rough guess, for this machine to be measured first.
_WORTH = 60.0
#: Seconds of a run from which on it is told what is left.
_LONG = 30.0
#: Units of a task whose own pace counts, and how many must be done before.
_PACED, _UNITS = frozenset({"blocks", "steps"}), 2


def predicted_seconds(
    plan: Plan, missing: Sequence[PlannedStage], device: str, dtype: str, progress: Progress
) -> dict[int, float | None]:
    """The seconds that each missing stage takes by its number, and with the number after the last stage the evaluation.

    None where the work is not known, or its rates. Measures this machine where a stage takes long and an earlier measurement
    is not there.
    """
    works = {stage.index: _stage_work(stage) for stage in missing}
    works[len(plan.stages) + 1] = plan.beside.evaluation
    if not computes_on_cpu(device) or dtype != "float32" or all(work is None for work in works.values()):
        return dict.fromkeys(works)
    rates = cached_rates()
    if rates is None:
        if max(rough_seconds(work) for work in works.values() if work is not None) < _WORTH:
            return dict.fromkeys(works)
        from compress.blockwise.rates import kept_rates

        rates = kept_rates(progress)
    return {number: None if work is None else rates.predict(work) for number, work in works.items()}


def _stage_work(stage: PlannedStage) -> Work | None:
    result = Work()
    for planned in stage.passes:
        if planned.work is None:
            return None
        result.add_all(planned.work)
    return result


class Forecast:
    """Progress that also tells what is left of the run.

    Args:
        inner: receives everything; notes of its tasks begin with the time that is left.
        predicted: seconds of the stages that will be computed, by number from 1, and of the evaluation, with the number after
            the last stage; None where it is not known.
    """

    def __init__(
        self, inner: Progress, predicted: dict[int, float | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._inner, self._predicted, self._clock = inner, predicted, clock
        self._now, self._begun = 0, 0.0
        self._expected = self._taken = 0.0

    def stage(self, index: int, total: int, title: str) -> None:
        """Begin a stage; where its time is known, say how long it takes, and the whole run."""
        self._inner.stage(index, total, title)
        self._begin(index)

    def evaluation(self, parts: int) -> None:
        """Begin the evaluation, after all stages. ``parts``: the stages and the evaluation."""
        self._inner.stage(parts, parts, "evaluation")
        self._begin(max(self._predicted, default=self._now + 1))

    def _begin(self, index: int) -> None:
        self._end()
        self._now, self._begun = index, self._clock()
        if (seconds := self._predicted.get(index)) is None:
            return
        now = self._pace() * seconds
        if (whole := now + self._later()) >= _LONG:
            alone = not self._later() and not self._at_least()
            rest = "" if alone else f", {self._at_least()}{minutes_text(whole)} to the end of the run"
            self._inner.message(f"about {minutes_text(now)}{rest}")

    def task(self, title: str, total: int | None = None, unit: str = "tensors") -> ProgressTask:
        """A task of the inner progress, whose notes say what is left."""
        return _Watched(self, self._inner.task(title, total, unit), total if unit in _PACED else None)

    def message(self, text: str) -> None:
        """A line of the inner progress."""
        self._inner.message(text)

    def left(self, begun: float, done: int, total: int | None) -> float | None:
        """Seconds that are left of the run; None where it is not known of the present stage.

        Of a task over blocks or steps that has done a few, its pace counts in the place of the prediction.
        """
        seconds = self._predicted.get(self._now)
        now = self._clock()
        if seconds is None:
            return None
        rest = max(0.0, self._pace() * seconds - (now - self._begun))
        if total is not None and done >= _UNITS:
            rest = (now - begun) / done * (total - done)
        return rest + self._later()

    def text(self, begun: float, done: int, total: int | None) -> str:
        """Words for what is left; empty where that is short or not known."""
        left = self.left(begun, done, total)
        spent = self._clock() - self._begun
        if left is None or (left < _LONG and spent + left < _LONG):
            return ""
        return f"{self._at_least()}{minutes_text(left)} to the end"

    def _pace(self) -> float:
        """Seconds that finished stages took over those predicted of them; 1 without such."""
        return self._taken / self._expected if self._expected else 1.0

    def _later(self) -> float:
        """Seconds of the stages after this one that are known."""
        return self._pace() * sum(s for i, s in self._predicted.items() if i > self._now and s is not None)

    def _at_least(self) -> str:
        unknown = any(s is None for i, s in self._predicted.items() if i > self._now)
        return "more than " if unknown else ""

    def _end(self) -> None:
        """Learn from the stage that has ended."""
        if (seconds := self._predicted.pop(self._now, None)) is not None:
            self._expected += seconds
            self._taken += self._clock() - self._begun


class _Watched:
    """A task whose notes begin with the forecast."""

    def __init__(self, forecast: Forecast, inner: ProgressTask, total: int | None) -> None:
        self._forecast, self._inner, self._total = forecast, inner, total
        self._begun, self._done, self._note = forecast._clock(), 0, ""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count units; those of an earlier run, which come first and without a note, take no time."""
        if not note and self._total is not None and not self._done:
            self._total -= steps
        else:
            self._done += steps
        self._note = note or self._note
        left = self._forecast.text(self._begun, self._done, self._total)
        self._inner.advance(steps, " · ".join(part for part in (left, self._note) if part))

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)
