"""A process that works on a sweep: it takes trials until none is left, and waits for those of others."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Literal

from compress.errors import CompressError
from compress.files import remove
from compress.pipeline.shared import SharedWork
from compress.progress import Progress
from compress.sweeps.front import front
from compress.sweeps.goals import losses, text, title
from compress.sweeps.samplers import propose
from compress.sweeps.study import Claim, Outcome, Study, SweepTrial, TrialPart
from compress.sweeps.trials import TrialRuns, described

#: Seconds between two looks at what others have finished.
_WAIT = 0.5
#: So many first trials that fail for one reason end a sweep.
_ALIKE = 3
#: Without `max_disk`, bytes of shared stages as a multiple of the original's.
_SHARED = 4


def work(trials: TrialRuns, progress: Progress) -> None:
    """Run trials until all are finished, by this process or another."""
    study, news, waits = trials.study, News(trials.study, progress), False
    while True:
        with study.locked() as known:
            task = _next(trials, known, news)
        if task is None:
            return
        if task == "wait":
            if not waits:
                running = [str(trial.number) for trial in known if trial.running]
                progress.message(f"waiting for other processes: trial{'s' * (len(running) > 1)} {', '.join(running)}")
            waits = True
            time.sleep(_WAIT)
            continue
        waits = False
        try:
            progress.stage(task.trial.number, study.search.trials, described(study, task.trial.values))
            outcome = trials.run(task)
            with study.locked():
                study.ended(task.trial, task.part, outcome)
                known = study.trials()
                _tidy(trials, known)
            news.tell(known)
        finally:
            task.release()


class News:
    """Tells once how each part of a trial ended, whoever ran it; not those that had ended before."""

    def __init__(self, study: Study, progress: Progress) -> None:
        self._study, self._progress = study, progress
        self._told = {key for trial in study.trials() for key in _ends(trial)}
        self.count = 0

    def tell(self, known: Sequence[SweepTrial]) -> None:
        """Tell what has ended since the last time."""
        for trial in known:
            new = _ends(trial) - self._told
            self._told |= new
            self.count += len(new)
            if new and not trial.running:
                self._progress.message(told(self._study, trial, known))


def _ends(trial: SweepTrial) -> set[tuple[int, str]]:
    """The parts of a trial that have ended."""
    return {(trial.number, part) for part, outcome in trial.parts.items() if outcome.state != "running"}


def _next(trials: TrialRuns, known: list[SweepTrial], news: News) -> Claim | Literal["wait"] | None:
    """The next work of this process: a lost part of a trial, a new trial, an evaluation in full, or nothing; under the lock."""
    study = trials.study
    news.tell(known)
    for trial in known:
        if trial.running and (task := study.take(trial, "full" if "full" in trial.parts else "proxy")) is not None:
            return task
    check_alike(known)
    while (new := propose(study.search, known)) is not None:
        refused = _refused(trials, new, known)
        if (task := _begun(study, new, study.first_part)) and refused is None:
            return task
        assert refused is not None
        study.ended(new, study.first_part, refused)
        task.release()
        known = study.trials()
        news.tell(known)
    if any(trial.running for trial in known):
        return "wait"
    for trial in candidates(study, known):
        if "full" not in trial.parts:
            return _begun(study, trial, "full")
    return None


def check_alike(known: Sequence[SweepTrial]) -> None:
    """Raise `CompressError` if the first trials that ran failed for one reason: the others would too.

    Memory and disk are no such reason: a later trial may need less.
    """
    ended = [trial.last for trial in known if trial.last.seconds]
    if len(ended) < _ALIKE or any(outcome.state != "failed" or outcome.lack for outcome in ended):
        return
    if len({re.sub(r"\d+", "", outcome.message or "") for outcome in ended[:_ALIKE]}) == 1:
        raise CompressError(
            f"the first {_ALIKE} trials failed: {ended[0].message}", fix="the same command tries them again"
        )


def _begun(study: Study, trial: SweepTrial, part: TrialPart) -> Claim:
    """Take a part of a trial that nobody has; under the lock."""
    task = study.take(trial, part)
    assert task is not None, "a trial is locked that has not begun"
    study.begun(trial, part)
    return task


def _refused(trials: TrialRuns, trial: SweepTrial, known: Sequence[SweepTrial]) -> Outcome | None:
    """Why a trial is not run: its values do not go together, or its plan is hopeless. Its planned values are set."""
    try:
        plan = trials.plan(trial)
    except CompressError as error:
        return Outcome("failed", message=str(error).splitlines()[0])
    size = plan.stages[-1].size
    trial.planned = {"size": float(size.bytes), "parameters": float(size.parameters)}
    return trials.hopeless(trial, plan, known)


def candidates(study: Study, trials: Sequence[SweepTrial]) -> list[SweepTrial]:
    """The front by the part that every trial begins with. A smaller evaluation leaves out only those whose gates failed.

    A trial that did not pass in full is out, so that those that it beat are evaluated.
    """
    sweep, proxy = study.search.sweep, study.first_part == "proxy"
    judged = [t for t in trials if t.first.feasible or (proxy and t.first.verdict == "inconclusive")]
    judged = [t for t in judged if t.running or t.last.feasible or len(t.parts) == 1]
    return [judged[i] for i in front([losses(trial.first.goals, sweep) for trial in judged])]


def unfinished(study: Study, known: Sequence[SweepTrial]) -> bool:
    """Whether a trial is left, or a part of one."""
    if any(trial.running for trial in known) or propose(study.search, known) is not None:
        return True
    return any("full" not in trial.parts for trial in candidates(study, known))


def best(study: Study, trials: Sequence[SweepTrial]) -> list[SweepTrial]:
    """The front: trials that were evaluated in full, passed every gate, and that no other one beats in every goal."""
    sweep = study.search.sweep
    judged = [t for t in trials if "full" in t.parts and t.parts["full"].feasible]
    return [judged[i] for i in front([losses(trial.parts["full"].goals, sweep) for trial in judged])]


def _tidy(trials: TrialRuns, known: list[SweepTrial]) -> None:
    """Remove what is not to be kept: checkpoints off the front, and shared stages beyond their limit; under the lock."""
    study = trials.study
    sweep = study.search.sweep
    SharedWork.at(study.shared).limit(sweep.max_disk or _SHARED * trials.original_bytes)
    if sweep.keep == "all":
        return
    kept = {trial.number for trial in [*candidates(study, known), *best(study, known)]}
    for trial in known:
        if trial.number not in kept and not trial.running:
            trials.forget(trial)


def finish(trials: TrialRuns) -> None:
    """Remove the stages of a sweep that has ended, shared ones and those of trials: checkpoints and reports stay."""
    if trials.study.search.sweep.keep == "front" and not unfinished(trials.study, trials.study.trials()):
        remove(trials.study.shared / "stages")
        for trial in trials.study.trials():
            trials.thin(trial)


def told(study: Study, trial: SweepTrial, known: Sequence[SweepTrial]) -> str:
    """A line on a part of a trial that has ended."""
    head = f"trial {trial.number} of {study.search.trials} ({described(study, trial.values)})"
    outcome = trial.last
    if outcome.state == "failed":
        return f"✗ {head}: failed; {outcome.message}"
    if outcome.state == "pruned":
        return f"{head}: not run; {outcome.message}"
    values = ", ".join(f"{title(goal)} {text(goal, outcome.goals[goal][0])}" for goal in study.search.sweep.goals)
    on_front = trial.number in {each.number for each in candidates(study, known)}
    judged = {"failed": "a gate failed", "inconclusive": "a gate is inconclusive"}.get(outcome.verdict or "")
    place = judged or ("on the front so far" if on_front else "beaten")
    return f"✓ {head}: {values}; {place}; {outcome.seconds:.0f} s"
