"""Checks across keys and against the disk: the order of passes, missing data, missing files."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from compress import passes
from compress.checkpoint.hub import is_hub_id
from compress.data.default_text import DEFAULT
from compress.data.kinds import refusal
from compress.errors import CompressError
from compress.evaluation.repetition_settings import RepetitionSettings
from compress.evaluation.tasks import SPEED_METRICS, TEXT_METRICS, Given, measurable
from compress.recipe.entries import PassEntry, parse_pass
from compress.recipe.gates import bounds, metric_of
from compress.recipe.model import Recipe
from compress.recipe.order import misplaced
from compress.recipe.problems import ListNode, MapNode, Problem, find_place, node_at, pass_name, plain, text_of
from compress.recipe.sweep import DIRECTIONS, OF_TASKS, metric_of_goal, task_of_goal


def misplaced_passes(root: MapNode, values: dict[str, Any]) -> Iterator[Problem]:
    """A problem for each pass that cannot follow the passes before it."""
    for wrong in misplaced(list(_entries(values))):
        yield Problem(wrong.message, *_at_pass(root, wrong.index), wrong.hint)


#: Kind of the given data ▶ what a metric that cannot be measured on it needs, and what to do.
_LACKING: dict[Given, tuple[str, str]] = {
    "images": ("is measured on text, not images", "name `files` in data.evaluation"),
    "labelled": ("is measured on text without labels", "leave out `label`"),
    "text": ("is measured on text with labels", "add to data.evaluation: `text: COLUMN, label: COLUMN`"),
}


def lacking_data(root: MapNode, values: dict[str, Any]) -> Iterator[Problem]:
    """A problem for each pass, metric or gate whose data set is missing, or is of another kind."""
    data = values.get("data", {})
    if not isinstance(data, dict):
        return
    given = {name for name, value in data.items() if value is not None}
    for index, entry in _entries(values):
        for name in sorted(passes.get(entry.name).required_data(entry.settings) - given):
            yield Problem(
                f"{entry.name} needs {name} text, and there is no `data.{name}`",
                *_at_pass(root, index),
                _data_hint(name, entry),
            )
    lacking, hint = "needs evaluation text, and there is no `data.evaluation`", _data_hint("evaluation")
    possible: frozenset[str] = frozenset()
    if "evaluation" in given:
        keys = data["evaluation"] if isinstance(data["evaluation"], dict) else {}
        kind: Given = "images" if keys.get("images") else "text" if keys.get("label") is None else "labelled"
        possible = measurable(kind)
        lacking, hint = _LACKING[kind]
    wanted = values.get("evaluate")
    for i, value in enumerate(wanted if isinstance(wanted, list) else []):
        metric = next(iter(value)) if isinstance(value, dict) and len(value) == 1 else value
        if isinstance(metric, str) and metric in TEXT_METRICS - possible:
            path: tuple[str | int, ...] = ("evaluate", i)
            yield Problem(f"{metric} {lacking}", find_place(root, path), path, hint)
    gates = values.get("gates")
    for gate in gates if isinstance(gates, dict) else {}:
        if metric_of(gate) in TEXT_METRICS - possible:
            path = ("gates", gate)
            place = find_place(root, path, key=True)
            yield Problem(f"the gate {gate} {lacking}", place, path, hint)
    for path, goal in _goals(values):
        if metric_of_goal(goal) in TEXT_METRICS - possible:
            yield Problem(f"the goal {goal} {lacking}", find_place(root, path), path, hint)


def _goals(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """The goals of a sweep, each with its path."""
    section = values.get("sweep")
    section = section if isinstance(section, dict) else {}
    for key in DIRECTIONS:
        listed = section.get(key)
        for i, goal in enumerate(listed if isinstance(listed, list) else []):
            if isinstance(goal, str):
                yield ("sweep", key, i), goal


def lengths_not_measured(root: MapNode, recipe: Recipe) -> Iterator[Problem]:
    """A problem for each gate at a length of prompt that the recipe does not measure."""
    measured = getattr(recipe.settings_of("latency"), "lengths", None) or ()
    for name in recipe.gates.given():
        if metric_of(name) not in SPEED_METRICS:
            continue
        for i, gate in enumerate(getattr(recipe.gates, name)):
            if gate.at is not None and gate.at not in measured:
                listed = isinstance(node_at(root, ("gates", name)), ListNode)
                path = ("gates", name, *((i,) if listed else ()), "at")
                wanted = ", ".join(map(str, sorted({*measured, gate.at})))
                yield Problem(
                    f"the gate {name} needs a prompt of {gate.at} tokens, which is not measured",
                    find_place(root, path),
                    path,
                    f"write in evaluate: `- latency: {{lengths: [{wanted}]}}`",
                )


def tasks_not_measured(root: MapNode, recipe: Recipe) -> Iterator[Problem]:
    """A problem for each gate or goal on a task of lm-eval that is not measured, where no file could hold the task."""
    settings = recipe.settings_of("lm_eval") if "lm_eval" in recipe.metrics else None
    measured: tuple[str, ...] = getattr(settings, "tasks", ())
    goals = [(path, goal) for path, goal in _goals(plain(root)) if goal.startswith(OF_TASKS)]
    if settings is not None and not measured:
        at = next((i for i, entry in enumerate(recipe.evaluate or ()) if entry.name == "lm_eval"), None)
        asked = ("gates", "lm_eval") if recipe.gates.lm_eval or not goals else goals[0][0]
        path: tuple[str | int, ...] = asked if at is None else ("evaluate", at)
        hint = "write in evaluate: `- lm_eval: {tasks: [arc_easy]}`"
        yield Problem("lm_eval names no task", find_place(root, path), path, hint)
        return
    if any(task.endswith(".yaml") for task in measured):
        return
    listed = isinstance(node_at(root, ("gates", "lm_eval")), ListNode)
    needed = [
        (("gates", "lm_eval", *((i,) if listed else ()), "task"), "gate lm_eval", gate.task)
        for i, gate in enumerate(recipe.gates.lm_eval or ())
    ]
    needed += [(path, f"goal {goal}", task_of_goal(goal, measured)[0]) for path, goal in goals]
    for path, who, task in needed:
        if not any(task == name or task.startswith(f"{name}_") for name in measured):
            yield Problem(
                f"the {who} needs the task {task}, which is not measured",
                find_place(root, path),
                path,
                f"write in evaluate: `- lm_eval: {{tasks: [{', '.join([*measured, task])}]}}`",
            )


def places_not_measured(root: MapNode, recipe: Recipe) -> Iterator[Problem]:
    """A problem for each gate at a distance or position that the recipe does not measure."""
    evaluation = recipe.data.evaluation
    for name in recipe.gates.given():
        for i, gate in enumerate(bounds(getattr(recipe.gates, name))):
            listed = isinstance(node_at(root, ("gates", name)), ListNode)
            path: tuple[str | int, ...] = ("gates", name, *((i,) if listed else ()))
            first, at = getattr(gate, "from_position", None), getattr(gate, "at", None)
            if first is not None and evaluation is not None and not evaluation.streaming and first >= evaluation.window:
                text = f"no token is predicted at position {first} or later in windows of {evaluation.window} tokens"
                hint = f"set data.evaluation.window to {2 * first}, or at least {first + 1}"
                yield Problem(text, find_place(root, (*path, "from_position")), (*path, "from_position"), hint)
            if name == "repetition" and at is not None and evaluation is not None:
                measured = _distances(recipe, evaluation.window)
                if at not in measured:
                    wanted = ", ".join(map(str, sorted({*measured, at})))
                    text = f"the gate repetition needs the distance {at}, which is not measured"
                    hint = f"write in evaluate: `- repetition: {{distances: [{wanted}]}}`"
                    yield Problem(text, find_place(root, (*path, "at")), (*path, "at"), hint)


def _distances(recipe: Recipe, window: int) -> tuple[int, ...]:
    """The distances of repetitions that a recipe measures; none where its settings do not fit, which is told elsewhere."""
    settings = recipe.settings_of("repetition")
    assert isinstance(settings, RepetitionSettings)
    try:
        return settings.fitted(window)[1]
    except CompressError:
        return ()


def _entries(values: dict[str, Any]) -> Iterator[tuple[int, PassEntry]]:
    listed = values.get("passes")
    for index, value in enumerate(listed if isinstance(listed, list) else []):
        with contextlib.suppress(ValidationError, PydanticCustomError):  # reported by `translate`, with its place
            yield index, parse_pass(value)


def _at_pass(root: MapNode, index: int) -> tuple[Any, tuple[str | int, ...]]:
    name = pass_name(node_at(root, ("passes", index)))
    path = ("passes", index, name or "")
    return find_place(root, path, key=True), path


def _data_hint(name: str, entry: PassEntry | None = None) -> str:
    hint = f"add to data: `{name}: {{files: [FILE]}}`, or `{name}: default`"
    dataless = None if entry is None else _dataless(entry)
    return hint if dataless is None else f"{hint}; `method: {dataless}` reads none"


def _dataless(entry: PassEntry) -> str | None:
    """A method of the pass that reads no data with the other settings as they are; None without such."""
    field = type(entry.settings).model_fields.get("method")
    instance = passes.get(entry.name)
    methods = get_args(field.annotation) if field is not None else ()
    return next(
        (m for m in methods if not instance.required_data(entry.settings.model_copy(update={"method": m}))), None
    )


def missing_files(root: MapNode) -> Iterator[Problem]:
    """A problem for each data file that is missing or of an unknown kind, and a model that is neither folder nor hub id."""
    data = root.get("data")
    for name, entry in data.entries.items() if isinstance(data, MapNode) else ():
        files = entry.node.get("files") if isinstance(entry.node, MapNode) else None
        for folder in ("images", "speech"):
            given = text_of(entry.node.get(folder)) if isinstance(entry.node, MapNode) else None
            if given and not (path := _local(given)).is_dir():
                what = "is not a folder" if path.exists() else "there is no such folder"
                key = ("data", name, folder)
                yield Problem(f"{given}: {what}", find_place(root, key), key, _near(path))
        for i, item in enumerate(files.items if isinstance(files, ListNode) else ()):
            text = text_of(item)
            if text == DEFAULT:
                continue
            if text and not (path := _local(text)).is_file():
                what = "is a folder, not a text file" if path.is_dir() else "there is no such file"
                yield Problem(f"{text}: {what}", item.place, ("data", name, "files", i), _near_file(text, path))
            elif text and (wrong := refusal(text, ids=name != "evaluation")):
                yield Problem(f"{text}: {wrong}", item.place, ("data", name, "files", i))
    if text := text_of(root.get("model")):
        path, place = _local(text), find_place(root, ("model",))
        if path.exists():
            if not path.is_dir() and path.suffix != ".gguf":
                yield Problem(f"{text}: is a file, not a checkpoint's folder", place, ("model",))
        elif not is_hub_id(text):
            hint = _near(path) or "a hub id is `name` or `organisation/name`"
            yield Problem(f"{text}: there is no such folder", place, ("model",), hint)


def _local(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~name of nobody
        return Path(text)


def _near_file(text: str, path: Path) -> str | None:
    """A hint for a missing file: a name like that of a data set on the hub has a key of its own."""
    like_an_id = "/" in text and not path.suffix and not path.parent.exists() and is_hub_id(text)
    return f"for a data set of the hub write `dataset: {text}`" if like_an_id else _near(path)


def _near(path: Path) -> str | None:
    """A hint: a file of a similar name beside it, or where relative paths start."""
    if path.exists():
        return None
    try:
        if path.parent.is_dir():
            names = [entry.name for entry in path.parent.iterdir()]
            close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
            return f"did you mean `{path.parent / close[0]}`?" if close else None
        existing = next((parent for parent in path.parents if parent.is_dir()), None)
    except OSError:
        return None
    return f"relative paths start at the current folder, {Path.cwd()}" if existing == Path() else None
