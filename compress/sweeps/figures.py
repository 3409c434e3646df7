"""Rows of text on a sweep: the front, every trial, and sentences. The command and the page use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.sweeps.document import nearest
from compress.sweeps.goals import text

_STATES = {"running": "running", "pruned": "not run", "failed": "failed"}
_VERDICTS = {"failed": "a gate failed", "inconclusive": "a gate is inconclusive"}


def summary(sweep: Mapping[str, Any]) -> str:
    """How many trials there were, and how many are on the front, in one line."""
    trials = sweep["trials"]
    counts = {
        state: sum(trial["state"] == state for trial in trials) for state in ("done", "pruned", "failed", "running")
    }
    words = {"done": "ran", "pruned": "not run", "failed": "failed", "running": "running"}
    parts = ", ".join(f"{count} {words[state]}" for state, count in counts.items() if count)
    front = len(sweep["front"])
    result = f"{front} on the front" if front else "none passed every gate"
    return f"{len(trials)} trial{'s' if len(trials) != 1 else ''}: {parts}; {result}"


def notes(sweep: Mapping[str, Any], *, intervals: bool = True) -> list[str]:
    """Sentences on the table: the nearest trial where none passed, shared stages, the smaller evaluation.

    Args:
        intervals: the table has them.
    """
    made = []
    if (trial := nearest(sweep)) is not None:
        failed = next((gate for gate in trial["gates"] if gate["verdict"] == "fail"), None)
        if failed is not None:
            made.append(f"nearest: trial {trial['number']} ({_values(trial)}): {failed['gate']} {failed['text']}")
    elif not sweep["front"]:
        pruned = [trial for trial in sweep["trials"] if trial["state"] == "pruned"]
        if pruned:
            least = min(pruned, key=lambda trial: trial["excess"])
            made.append(f"nearest: trial {least['number']} ({_values(least)}): {least['message']}")
    if not sweep["front"] and (undecided := _undecided(sweep)) is not None:
        made.append(undecided)
    if intervals and sweep["front"] and _has_intervals(sweep):
        made.append("in brackets: the interval of each value; values whose intervals overlap may not differ")
    if lacking := sum(trial["lack"] for trial in sweep["trials"]):
        trials = f"{lacking} trial{'s' if lacking > 1 else ''}"
        made.append(f"{trials} failed for lack of memory or disk, or by a kill; the same command tries again")
    reused = sum(trial["reused"] for trial in sweep["trials"])
    if reused:
        made.append(f"{reused} stage{'s' if reused > 1 else ''} came from earlier trials")
    if sweep["first_part"] == "proxy":
        made.append("every trial was evaluated on fewer documents (`proxy`), the front in full")
    return made


def _undecided(sweep: Mapping[str, Any]) -> str | None:
    """A sentence on the first gate that was inconclusive; None where there is none."""
    for trial in sweep["trials"]:
        for gate in trial["gates"]:
            if trial["verdict"] == gate["verdict"] == "inconclusive":
                return f"inconclusive: trial {trial['number']} ({_values(trial)}): {gate['gate']} {gate['text']}"
    return None


def failures(sweep: Mapping[str, Any]) -> list[str]:
    """A line for each reason for which trials failed, with their numbers."""
    by_reason: dict[str, list[str]] = {}
    for trial in sweep["trials"]:
        if trial["state"] == "failed":
            by_reason.setdefault(trial["message"], []).append(str(trial["number"]))
    return [
        f"trial{'s' if len(numbers) > 1 else ''} {', '.join(numbers)} failed: {reason}"
        for reason, numbers in by_reason.items()
    ]


def _has_intervals(sweep: Mapping[str, Any]) -> bool:
    return any(len(set(values)) > 1 for trial in sweep["trials"] for values in trial["goals"].values())


def _values(trial: Mapping[str, Any]) -> str:
    return ", ".join(f"{label} {value}" for label, value in trial["shown"].items())


def front_columns(sweep: Mapping[str, Any]) -> tuple[list[str], set[int]]:
    """Names of the columns of `front_cells`, and the numbers of those that are aligned right."""
    goals = [goal["title"] for goal in sweep["goals"]]
    names = ["trial", *goals, *(each["label"] for each in sweep["searched"])]
    return names, set(range(1 + len(goals)))


def front_cells(sweep: Mapping[str, Any], *, intervals: bool) -> list[tuple[str, ...]]:
    """A row for each trial of the front, by the first goal."""
    by_number = {trial["number"]: trial for trial in sweep["trials"]}
    return [_row(sweep, by_number[number], intervals=intervals) for number in sweep["front"]]


def trial_cells(sweep: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each trial, with what became of it at the end."""
    return [(*_row(sweep, trial, intervals=True), outcome(trial)) for trial in sweep["trials"]]


def _row(sweep: Mapping[str, Any], trial: Mapping[str, Any], *, intervals: bool) -> tuple[str, ...]:
    goals = [_goal(sweep, trial, goal["name"], intervals) for goal in sweep["goals"]]
    return str(trial["number"]), *goals, *(trial["shown"].get(each["label"], "") for each in sweep["searched"])


def _goal(sweep: Mapping[str, Any], trial: Mapping[str, Any], goal: str, intervals: bool) -> str:
    values: Sequence[float | None] = trial["goals"].get(goal, ())
    if not values and goal in trial["planned"]:
        return text(goal, trial["planned"][goal])
    value, lower, upper = values or (None, None, None)
    if value is None:
        return ""
    shown = text(goal, value)
    if goal == "size":
        shown += f" (× {value / max(sweep['original']['bytes'], 1):.3f})"
    if intervals and lower is not None and upper is not None and lower != upper:
        shown += f" ({text(goal, lower)} to {text(goal, upper)})"
    return shown


def outcome(trial: Mapping[str, Any]) -> str:
    """The fate of a trial in words: front, beaten, a gate failed, not run; `failures` has the reasons of those that failed."""
    if trial["front"]:
        return "front"
    if trial["state"] in _STATES:
        more = f": {trial['message']}" if trial["state"] == "pruned" else ""
        return _STATES[trial["state"]] + more
    return _VERDICTS.get(trial["verdict"], "beaten")
