"""Functions that take a recipe: run, check, plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.api.guarded import guarded
from compress.progress.display import chosen

if TYPE_CHECKING:
    from compress.pipeline.check import CheckResult
    from compress.pipeline.results import RunResult
    from compress.planning import Plan
    from compress.progress import Progress
    from compress.recipe import Recipe


def read_recipe(recipe: str | Path | Mapping[str, Any], sets: Sequence[str] = ()) -> Recipe:
    """A recipe from a file or from a mapping. ``sets`` override keys, as `--set`. Raises `RecipeError` with every mistake."""
    from compress.recipe import load_recipe, recipe_from_mapping

    if isinstance(recipe, Mapping):
        return recipe_from_mapping(dict(recipe), sets)
    return load_recipe(Path(recipe), sets)


@guarded
def run(
    recipe: str | Path | Mapping[str, Any],
    *,
    sets: Sequence[str] = (),
    fresh: bool = False,
    publish_anyway: bool = False,
    progress: Progress | bool | None = None,
) -> RunResult:
    """Run a recipe. A failed gate raises nothing; ``result.verdict`` holds it.

    Args:
        recipe: path of a YAML file, or a mapping with the same keys.
        sets: overrides, as ``--set``: ``passes.0.cast.weights=fp16``.
        fresh: compute every stage anew. publish_anyway: publish even where a gate fails.
        progress: True shows it on stderr, or as bars in a notebook, where that is the default. Or an object of your own that
            receives what happens, see `compress.progress.Progress`.

    Returns:
        A `compress.pipeline.results.RunResult`: ``checkpoint`` (Path), ``report`` (dict, schema ``compress.report/1``),
        ``verdict`` (str: passed, failed, inconclusive, no gates), ``exit_status`` (int), ``published`` (bool).

    Raises:
        RecipeError: with every mistake in the recipe. CompressError: the run cannot end with a model.
    """
    from compress.pipeline.run import run as run_recipe
    from compress.recipe.located import Located

    loaded, path = read_recipe(recipe, sets), None if isinstance(recipe, Mapping) else str(recipe)
    with Located(loaded), chosen(progress) as shown:
        return run_recipe(loaded, fresh=fresh, publish_anyway=publish_anyway, progress=shown, recipe_path=path)


@guarded
def check(recipe: str | Path | Mapping[str, Any], *, sets: Sequence[str] = (), data: bool = False) -> CheckResult:
    """Check a recipe without reading weights: its keys, files and folders, and its plan if its model is a local folder.

    Args:
        recipe, sets: as of `run`. data: read the text too, and search for evaluation text in training and calibration text.

    Returns:
        A `compress.pipeline.check.CheckResult`: ``recipe`` (Recipe), ``notes`` (tuple of str), ``local`` (bool).

    Raises:
        RecipeError: with every mistake, each with its line and a suggestion. CompressError: what a run would refuse.
    """
    from compress.pipeline.check import check as check_recipe

    return check_recipe(read_recipe(recipe, sets), data=data)


@guarded
def plan(recipe: str | Path | Mapping[str, Any], *, sets: Sequence[str] = ()) -> Plan:
    """The plan of a run, from headers only; reads no weights and imports no torch.

    Args:
        recipe, sets: as of `run`.

    Returns:
        A `compress.planning.Plan`; ``original`` and the ``stages`` hold sizes, ``to_dict()`` gives JSON values.

    Raises:
        RecipeError: with every mistake. CompressError: a pass does not apply to the model.
    """
    from compress.checkpoint.open import open_headers
    from compress.planning import make_plan
    from compress.recipe.located import Located

    loaded = read_recipe(recipe, sets)
    with Located(loaded):
        spec, metadata = open_headers(
            loaded.reference,
            trust_remote_code=loaded.trust_remote_code,
            ignore_auto_map=loaded.ignore_auto_map,
            offline=loaded.offline,
        )
        return make_plan(loaded, spec, metadata)
