"""The command ``fit``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.cli.commands.common import annotate_gates, annotated, print_json, progress, say
from compress.cli.guard import Judged


def fit(
    target: Path,
    sets: Sequence[str],
    *,
    bound: Mapping[str, str],
    output: Path | None,
    store: str | None,
    text: Path | None,
    only_search: bool,
    fresh: bool,
    offline: bool,
    json: bool,
    quiet: bool,
) -> None:
    """``compress fit``. ``bound``: keys of the section `fit`, as text."""
    from compress.cli import tables
    from compress.errors import EXIT_OK
    from compress.fits.begin import first_bound
    from compress.fits.run import fit as search
    from compress.recipe.bound import load_bound

    options = {"output": output, "store": store, "offline": "true" if offline else None}
    given = [f"fit.{key}={value}" for key, value in bound.items()]
    given += [f"{key}={value}" for key, value in options.items() if value is not None]
    with annotated(), progress(quiet) as shown:
        recipe: Path | dict[str, Any] = target
        if target.suffix not in (".yaml", ".yml"):
            recipe = first_bound(str(target), text, bound, offline=offline)
        loaded = load_bound(recipe, [*given, *sets])
        result = search(loaded.fit, loaded.mapping, shown, only_search=only_search, fresh=fresh)
    report = None if result.run is None else result.run.report
    if json:
        print_json({**result.document, "recipe": str(result.recipe), "report": report})
    else:
        tables.print_fit(result.document)
        say(f"recipe: {result.recipe}")
        if report is not None:
            tables.print_report(report)
    if result.run is None:
        raise Judged(EXIT_OK)
    if not result.run.published:
        say(
            f"not published; the result is in {result.run.checkpoint} (`compress run {result.recipe} --publish-anyway`)"
        )
    annotate_gates(result.run.report["gates"])
    raise Judged(result.run.exit_status)
