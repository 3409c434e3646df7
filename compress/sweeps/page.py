"""A sweep as one page of HTML: the front as a picture, every trial as a table, the recipes of the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from compress.report.html.page import Cells, figure_of, style, template
from compress.report.pictures.front import Axis, TrialPoint, front_picture
from compress.report.pictures.svg import Picture
from compress.sweeps.figures import failures, front_cells, front_columns, notes, summary, trial_cells
from compress.sweeps.goals import text


def render_sweep(sweep: Mapping[str, Any], recipes: Sequence[tuple[str, str]]) -> str:
    """Return the page of a sweep. ``recipes``: name and text of those of the front."""
    from compress import __version__

    names, right = front_columns(sweep)
    return template("sweep.html").render(
        sweep=sweep,
        version=__version__,
        title=f"{sweep['model']} ▶ {sweep['folder']}",
        verdict=summary(sweep),
        pictures=[figure_of(picture) for picture in pictures(sweep)],
        front=Cells(names, front_cells(sweep, intervals=True), right=sorted(right)),
        trials=Cells([*names, "outcome"], trial_cells(sweep), right=sorted(right)),
        notes=notes(sweep),
        failures=failures(sweep),
        recipes=recipes,
        style=style(charts=False),
    )


def pictures(sweep: Mapping[str, Any]) -> list[Picture]:
    """The first goal against each of the others."""
    first, *others = sweep["goals"]
    drawn = (front_picture(_points(sweep, first, other), _axis(first), _axis(other)) for other in others)
    return [picture for picture in drawn if picture is not None]


def _axis(goal: Mapping[str, Any]) -> Axis:
    return Axis(goal["title"], goal["better"] == "lower", partial(text, goal["name"]))


def _points(sweep: Mapping[str, Any], x: Mapping[str, Any], y: Mapping[str, Any]) -> list[TrialPoint]:
    points = []
    for trial in sweep["trials"]:
        ends = [trial["goals"].get(goal["name"]) or (None,) for goal in (x, y)]
        if None not in (*ends[0], *ends[1]):
            points.append(TrialPoint(trial["number"], tuple(ends[0]), tuple(ends[1]), _kind(trial)))
    return points


def _kind(trial: Mapping[str, Any]) -> Literal["front", "beaten", "failed"]:
    return "front" if trial["front"] else "failed" if trial["verdict"] in ("failed", "inconclusive") else "beaten"
