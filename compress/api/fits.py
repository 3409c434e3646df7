"""The function `fit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.api.guarded import guarded
from compress.progress.display import chosen

if TYPE_CHECKING:
    from compress.fits.run import FitResult
    from compress.progress import Progress


@guarded
def fit(
    recipe: str | Path | Mapping[str, Any],
    *,
    sets: Sequence[str] = (),
    only_search: bool = False,
    fresh: bool = False,
    progress: Progress | bool | None = None,
) -> FitResult:
    """Find the passes that keep a bound on bytes at the least divergence, and run them.

    Args:
        recipe: path of a YAML file with a section ``fit``, or a mapping with the same keys.
        sets: overrides, as ``--set``: ``fit.max_bytes=200MB``.
        only_search: write the recipe, and do not run it. fresh: measure everything again. progress: as of `run`.

    Returns:
        A `compress.fits.run.FitResult`: ``document`` (dict, schema ``compress.fit/1``), ``recipe`` (Path), ``run``
        (`RunResult`, or None).

    Raises:
        RecipeError: with every mistake in the recipe. CompressError: the bound cannot be kept, or a trial ended with an error.
    """
    from compress.fits.run import fit as search
    from compress.recipe.bound import load_bound

    loaded = load_bound(recipe if isinstance(recipe, Mapping) else Path(recipe), sets)
    with chosen(progress) as shown:
        return search(loaded.fit, loaded.mapping, shown, only_search=only_search, fresh=fresh)
