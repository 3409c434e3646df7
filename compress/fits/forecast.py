"""How long a search takes, before it starts, at the rates that were measured on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.passes.work import model_work, prediction_work
from compress.planning.make import make_plan
from compress.recipe import recipe_from_mapping
from compress.work import Work, cached_rates, computes_on_cpu, minutes_text

if TYPE_CHECKING:
    from compress.fits.search import Search


@dataclass(frozen=True)
class SearchTimes:
    """Seconds and trials of a search: the fewest, with the least amount of each family, and the most, with all of them.

    Attributes:
        partly: the time of some trials is not known, and not counted.
    """

    seconds: tuple[float, float]
    trials: tuple[int, int]
    partly: bool = False

    @property
    def text(self) -> str:
        """A line for the user."""
        few, many = (minutes_text(each) for each in self.seconds)
        more = "more than " if self.partly else "about "
        return f"{more}{few} to {many}: {self.trials[0]} to {self.trials[1]} trials"


def search_times(search: Search, device: str, dtype: str) -> SearchTimes | None:
    """The time of the trials that were not measured yet; None where a device's or dtype's rates are not known.

    Measures this machine where that has not been done.
    """
    if not computes_on_cpu(device) or dtype != "float32":
        return None
    rates = cached_rates()
    if rates is None:
        from compress.blockwise.rates import kept_rates

        rates = kept_rates(search.progress)
    known: dict[str, float | None] = {}

    def seconds(passes: list[dict[str, Any]], count: int) -> float | None:
        key = f"{passes} {count}"
        if key not in known:
            work = _trial_work(search, passes, count)
            known[key] = None if work is None else rates.predict(work)
        return known[key]

    ends = []
    for every in (False, True):
        ahead = [trial for trial in search.ahead(every=every) if not search.trials.measured(*trial)]
        ends.append([seconds(*trial) for trial in ahead])
    least, most = (sum(filter(None, each)) for each in ends)
    return SearchTimes((least, most), (len(ends[0]), len(ends[1])), None in ends[1])


def _trial_work(search: Search, passes: list[dict[str, Any]], count: int) -> Work | None:
    """Work of a trial: its process, passes, writing, and the predictions of the original and the result."""
    runner = search.trials
    recipe = recipe_from_mapping(runner.recipe(passes, count, runner.path / "work" / "planned" / "out"))
    plan = make_plan(recipe, search.spec)
    result = Work()
    result.add("start", 0, 1)
    for planned in (planned for stage in plan.stages for planned in stage.passes):
        if planned.work is None:
            return None
        result.add_all(planned.work)
    for spec in (search.spec, plan.stages[-1].passes[-1].spec):
        result.add_all(model_work(spec, runner.held_out))
        result.add_all(prediction_work(spec, runner.held_out.tokens))
    return result
