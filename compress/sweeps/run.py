"""A whole sweep: begin or join it, run trials, write the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.files import disk_errors, place, remove, write_atomically
from compress.pipeline.check import check
from compress.progress import Progress, SilentProgress
from compress.recipe.problems import plain
from compress.recipe.search import load_search
from compress.sweeps.document import document, to_text
from compress.sweeps.page import render_sweep
from compress.sweeps.samplers import check_sampler
from compress.sweeps.study import Study
from compress.sweeps.trials import Runner, TrialRuns, run_process
from compress.sweeps.worker import finish, work
from compress.sweeps.workers import beside, check_submit, run_jobs


def run_sweep(
    recipe: Path | Mapping[str, Any],
    sets: Sequence[str] = (),
    *,
    workers: int = 1,
    submit: str | None = None,
    submit_options: Sequence[str] = (),
    runner: Runner = run_process,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a sweep, or go on with one that was stopped.

    Args:
        recipe: a file or a mapping, with values to search. sets: overrides, as ``--set``.
        workers: processes that run trials at the same time. submit: start them by submitit, on ``slurm`` or ``local``.
        runner: runs the recipe of a trial; by default in a process of its own.

    Returns:
        JSON values, schema ``compress.sweep/1``.

    Raises:
        RecipeError: with every mistake in the recipe. OutputError: the folder holds the sweep of another recipe.
    """
    search = load_search(recipe, sets)
    check_sampler(search)
    options = check_submit(submit, submit_options)
    check(search.recipe)
    path = place(search.recipe.output)
    study = Study.begin(path.with_name(f"{path.name}.sweep"), search, plain(search.written))
    runs, shown = TrialRuns(study, runner), progress or SilentProgress()
    study.again()
    if workers > 1 and submit != "slurm" and {"latency", "throughput"} & set(search.recipe.metrics):
        shown.message("times are measured beside other trials, so they vary more than with `--workers 1`")
    if submit is not None:
        run_jobs(study, workers, submit, options, shown)
    else:
        with beside(study, workers - 1, shown):
            work(runs, shown)
    return _finished(runs)


def join_sweep(folder: Path, *, runner: Runner = run_process, progress: Progress | None = None) -> dict[str, Any]:
    """Take part in a sweep that has begun. Returns when it has ended, with its values as of `run_sweep`.

    Raises:
        CompressError: there is no sweep, or this machine does not see the same folder.
    """
    study = Study.join(folder)
    check_sampler(study.search)
    runs = TrialRuns(study, runner)
    work(runs, progress or SilentProgress())
    return _finished(runs)


def _finished(trials: TrialRuns) -> dict[str, Any]:
    """The document of a sweep, written with its renderings."""
    study = trials.study
    with study.locked():
        finish(trials)
        made = document(trials)
        with disk_errors(study.path):
            _write(trials, made)
    return made


def _write(trials: TrialRuns, made: Mapping[str, Any]) -> None:
    """Write the recipes of the front and the renderings of the sweep."""
    study = trials.study
    recipes, by_number = study.path / "front", {trial.number: trial for trial in study.trials()}
    recipes.mkdir(exist_ok=True)
    names = {f"{place:02d}.yaml": by_number[number] for place, number in enumerate(made["front"], 1)}
    for old in sorted(recipes.glob("*.yaml")):
        if old.name not in names:
            remove(old)
    texts = {name: trials.text(trial, "full") for name, trial in names.items()}
    for name, text in texts.items():
        write_atomically(recipes / name, text.encode())
    write_atomically(study.path / "sweep.json", to_text(made).encode())
    write_atomically(study.path / "sweep.html", render_sweep(made, list(texts.items())).encode())
