"""A sweep as JSON values: its goals, every trial, the front and the verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from compress.errors import EXIT_BAD_INPUT, EXIT_GATE_FAILED, EXIT_INCONCLUSIVE, EXIT_OK
from compress.planning import opened_size
from compress.recipe.space import labels
from compress.sweeps.goals import title
from compress.sweeps.study import Study, SweepTrial
from compress.sweeps.trials import TrialRuns, beside, shown
from compress.sweeps.worker import best

SCHEMA = "compress.sweep/1"


def document(trials: TrialRuns) -> dict[str, Any]:
    """The sweep as it is now, schema ``compress.sweep/1``."""
    study = trials.study
    known, search = study.trials(), study.search
    on_front = best(study, known)
    status, exit_status = _verdict(known, on_front)
    spec, metadata = trials.headers
    return {
        "schema": SCHEMA,
        "model": search.recipe.model,
        "folder": beside(study.path, study.folder),
        "sampler": search.sweep.sampler,
        "goals": [
            {"name": goal, "title": title(goal), "better": "lower" if search.sweep.lower(goal) else "higher"}
            for goal in search.sweep.goals
        ],
        "searched": [{"name": name, "label": label} for name, label in labels(search.space).items()],
        "planned_trials": search.trials,
        "original": asdict(opened_size(spec, search.recipe.max_shard_size, metadata)),
        "first_part": study.first_part,
        "trials": [_trial(trials, study, trial, on_front) for trial in known],
        "front": [trial.number for trial in on_front],
        "status": status,
        "exit_status": exit_status,
    }


def _trial(trials: TrialRuns, study: Study, trial: SweepTrial, on_front: Sequence[SweepTrial]) -> dict[str, Any]:
    outcome, output = trial.last, trials.output(trial)
    names = labels(study.search.space)
    return {
        "number": trial.number,
        "values": trial.values,
        "shown": {names[name]: shown(value) for name, value in trial.values.items()},
        "state": outcome.state,
        "verdict": outcome.verdict,
        "part": list(trial.parts)[-1] if trial.parts else None,
        "goals": {goal: _finite(values) for goal, values in outcome.goals.items()},
        "planned": trial.planned,
        "excess": outcome.excess,
        "gates": outcome.gates,
        "message": outcome.message,
        "lack": outcome.lack,
        "seconds": round(sum(part.seconds for part in trial.parts.values()), 1),
        "reused": trial.first.reused,
        "front": trial.number in {each.number for each in on_front},
        "checkpoint": beside(output, study.folder) if output.is_dir() else None,
    }


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _verdict(trials: Sequence[SweepTrial], on_front: Sequence[SweepTrial]) -> tuple[str, int]:
    """The verdict of a sweep, and the exit status for it."""
    if on_front:
        return "passed", EXIT_OK
    verdicts = {trial.last.verdict for trial in trials if trial.last.state == "done"}
    if "inconclusive" in verdicts:
        return "inconclusive", EXIT_INCONCLUSIVE
    if verdicts or any(trial.last.state == "pruned" for trial in trials):
        return "failed", EXIT_GATE_FAILED
    return "every trial failed", EXIT_BAD_INPUT


def nearest(sweep: Mapping[str, Any]) -> dict[str, Any] | None:
    """The trial that is least beyond the gates; None where one passed or none ran."""
    beyond = [trial for trial in sweep["trials"] if trial["state"] == "done" and trial["excess"] > 0]
    return None if sweep["front"] else min(beyond, key=lambda trial: trial["excess"], default=None)


def to_text(sweep: Mapping[str, Any]) -> str:
    """The document as strict JSON."""
    return json.dumps(sweep, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
