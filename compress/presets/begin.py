"""The first recipe for a checkpoint: of a goal, of a bound on bytes, or of a preset."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from compress.errors import CheckpointError, CompressError
from compress.presets.drafts import GOALS, of_goal, of_preset, within
from compress.presets.facts import read_facts
from compress.presets.fit import Fitted, fit


def first_recipe(
    model: str,
    goal: str,
    preset: str | None,
    max_bytes: int | None,
    output: str,
    offline: bool = False,
    **options: bool,
) -> Fitted:
    """A recipe that the checkpoint takes, by its headers.

    Args:
        model: folder or hub id. goal: of `GOALS`. preset: in place of a goal.
        max_bytes: most bytes of the result's weight files. output: folder that the recipe names.
        options: `trust_remote_code`, `ignore_auto_map`, `allow_links`.

    Raises:
        CompressError: there is no such checkpoint, no such preset, or the checkpoint takes no recipe of that kind.
    """
    if goal not in GOALS:
        close = difflib.get_close_matches(goal, GOALS, n=1)
        fix = f"did you mean `{close[0]}`?" if close else f"expected {', '.join(GOALS)}"
        raise CompressError(f"no goal is called `{goal}`", where="--goal", fix=fix)
    if max_bytes is not None and (preset is not None or goal == "fast"):
        raise CompressError("codes fit a bound on bytes", where="--max-bytes", fix="leave --preset and --goal fast out")
    if Path(model).suffix in (".yaml", ".yml"):
        raise CheckpointError(
            "is a recipe, not a checkpoint", where=model, fix="name the folder of a model, or a hub id"
        )
    facts = read_facts(model, offline=offline, **options)
    if preset is not None:
        return fit(facts, [of_preset(preset, facts)], output)
    return fit(facts, of_goal(goal, facts) if max_bytes is None else within(facts), output, max_bytes)


def named_output(model: str, what: str) -> str:
    """A folder in the current one for the result, named after model and goal or preset, that is not there yet."""
    name = Path(model.partition("@")[0]).resolve().name.removesuffix(".gguf")
    first = f"{name}-{re.sub(r'[^a-z0-9]+', '-', what.lower()).strip('-')}"
    names = [first, *(f"{first}-{number}" for number in range(2, 100))]
    return next((n for n in names if not Path(n).exists()), names[-1])
