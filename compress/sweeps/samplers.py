"""The next trial of a sweep: a grid in order, or Optuna's samplers, which learn from earlier trials.

Optuna's study is made anew for each question from the trials of the journal, with a seed for the number of the trial. So a
sweep that was killed goes on with the trials that it would have had, and no process keeps a state of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.recipe.search import SearchRecipe
from compress.recipe.space import Dimension, active
from compress.sweeps.goals import losses
from compress.sweeps.study import SweepTrial

if TYPE_CHECKING:
    import optuna

#: Draws of a trial that all earlier ones are unlike.
_DRAWS = 50


def check_sampler(search: SearchRecipe) -> None:
    """Check that the sampler is installed. Raises `CompressError`."""
    if search.sweep.sampler != "grid" and find_spec("optuna") is None:
        raise CompressError(
            f"`{search.sweep.sampler}` needs Optuna",
            where="sweep.sampler",
            fix="pip install 'compress-toolkit[sweep]', or use `sampler: grid`",
        )


def propose(search: SearchRecipe, trials: Sequence[SweepTrial]) -> SweepTrial | None:
    """The next trial; None where there is none that differs from all before it."""
    number = len(trials) + 1
    if number > search.trials:
        return None
    if search.sweep.sampler == "grid":
        known = [trial.values for trial in trials]
        values = next((values for values in search.grid() if values not in known), None)
        return None if values is None else SweepTrial(number, values)
    return _sampled(search, trials, number)


def _sampled(search: SearchRecipe, trials: Sequence[SweepTrial], number: int) -> SweepTrial | None:
    """A trial of Optuna's sampler, drawn again while it equals an earlier one."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    known = [trial.values for trial in trials]
    for draw in range(_DRAWS):
        study = _study(search, trials, seed=(search.recipe.seed + 1_000_003 * number + draw) % 2**32)
        asked = study.ask(_distributions(search.space))
        values = {d.name: _value(d, asked.params[d.name]) for d in search.space}
        if (kept := active(search.space, values)) not in known:
            generation = {k: v for k, v in study.trials[-1].system_attrs.items() if k.endswith(":generation")}
            return SweepTrial(number, kept, {"params": dict(asked.params), "attributes": generation})
    return None


def _study(search: SearchRecipe, trials: Sequence[SweepTrial], seed: int) -> optuna.Study:
    import warnings

    import optuna

    def violations(trial: optuna.trial.FrozenTrial) -> Sequence[float]:
        return [float(trial.user_attrs.get("excess", 0.0))]

    sampler: optuna.samplers.BaseSampler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # options of samplers are marked experimental
        if search.sweep.sampler == "tpe":
            sampler = optuna.samplers.TPESampler(
                seed=seed, multivariate=True, constant_liar=True, constraints_func=violations
            )
        else:
            sampler = optuna.samplers.NSGAIISampler(
                seed=seed, population_size=_population(search), constraints_func=violations
            )
    directions = ["minimize" if search.sweep.lower(goal) else "maximize" for goal in search.sweep.goals]
    study = optuna.create_study(directions=directions, sampler=sampler)
    worst = _worst(search, trials)
    for trial in trials:
        study.add_trial(_frozen(search, trial, worst))
    return study


def _population(search: SearchRecipe) -> int:
    """A quarter of the trials, so that there are generations."""
    return max(4, min(50, search.trials // 4))


def _worst(search: SearchRecipe, trials: Sequence[SweepTrial]) -> list[float]:
    """For each goal the worst loss that was measured: what a trial that never ran is given."""
    sweep = search.sweep
    rows = [losses(trial.first.goals, sweep) for trial in trials if trial.first.state == "done"]
    return [max((row[i] for row in rows if math.isfinite(row[i])), default=0.0) for i in range(len(sweep.goals))]


def _frozen(search: SearchRecipe, trial: SweepTrial, worst: Sequence[float]) -> optuna.trial.FrozenTrial:
    """A trial of the journal as Optuna has it. Those beyond the gates, by plan or measurement, have a violation."""
    import optuna
    from optuna.trial import TrialState

    sweep, first = search.sweep, trial.first
    state = {"done": TrialState.COMPLETE, "pruned": TrialState.COMPLETE, "running": TrialState.RUNNING}.get(
        first.state, TrialState.FAIL
    )
    values = None
    excess = first.excess if first.state != "pruned" else max(first.excess, 1e-6)
    if state is TrialState.COMPLETE:
        row = losses(first.goals, sweep) if first.goals else list(worst)
        signs = [1 if sweep.lower(goal) else -1 for goal in sweep.goals]
        values = [sign * (x if math.isfinite(x) else bad) for sign, x, bad in zip(signs, row, worst, strict=True)]
    attributes = {**trial.sampler.get("attributes", {}), "constraints": [excess]}
    return optuna.trial.create_trial(
        state=state,
        values=values,
        params=trial.sampler["params"],
        distributions=_distributions(search.space),
        user_attrs={"excess": excess},
        system_attrs=attributes,
    )


def _distributions(space: Sequence[Dimension]) -> dict[str, Any]:
    """Optuna's distribution of each dimension: of choices their numbers."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, Any] = {}
    for d in space:
        if d.range is None:
            made[d.name] = CategoricalDistribution(list(range(len(d.choices))))
        elif d.range.whole:
            step = 1 if d.range.step is None or d.range.log else int(d.range.step)
            made[d.name] = IntDistribution(int(d.range.low), int(d.range.high), log=d.range.log, step=step)
        else:
            made[d.name] = FloatDistribution(
                d.range.low, d.range.high, log=d.range.log, step=None if d.range.log else d.range.step
            )
    return made


def _value(dimension: Dimension, sampled: Any) -> Any:
    """The value of a recipe for a sampled number."""
    if dimension.range is not None:
        return dimension.range.value(sampled)
    return dimension.ends()[sampled]
