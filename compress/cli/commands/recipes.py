"""The commands that read a recipe: run, check, plan."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.commands.begin import load_or_make
from compress.cli.commands.common import annotate_gates, annotated, load, print_json, progress, say
from compress.cli.guard import Judged, fail
from compress.recipe.located import Located

if TYPE_CHECKING:
    from compress.planning import Plan
    from compress.recipe import Recipe
    from compress.work import Rates


def run(
    path: Path,
    sets: Sequence[str],
    *,
    preset: str | None,
    output: Path | None,
    fresh: bool,
    publish_anyway: bool,
    shared: Path | None,
    offline: bool,
    json: bool,
    quiet: bool,
) -> None:
    """``compress run``. With ``preset`` the path is that of a model."""
    from compress.cli import tables

    with annotated():
        recipe = load_or_make(path, sets, preset, output, offline)
    with annotated(), Located(recipe), progress(quiet) as shown:
        from compress.pipeline.run import run as run_recipe

        result = run_recipe(
            recipe,
            fresh=fresh,
            publish_anyway=publish_anyway,
            shared=shared,
            progress=shown,
            recipe_path=str(path) if preset is None else None,
        )
    if json:
        print_json(result.report)
    else:
        if result.nothing_to_do:
            say(f"nothing to do: {result.checkpoint} already holds this recipe's result (--fresh runs it again)")
        tables.print_report(result.report)
        if not result.published:
            say(f"not published; the result is in {result.checkpoint} (--publish-anyway publishes it)")
    annotate_gates(result.report["gates"])
    raise Judged(result.exit_status)


def check(
    paths: Sequence[Path], sets: Sequence[str], *, data: bool, resolved: bool, json: bool, form: str | None
) -> None:
    """``compress check``. Every recipe is checked; the mistakes of all are shown."""
    from compress.cli import ci
    from compress.errors import CompressError

    if (json or resolved) and len(paths) > 1:
        raise CompressError("--json and --resolved take one recipe", fix="name one")
    if form not in (None, "text", "github", "sarif"):
        raise CompressError(f"there is no format `{form}`", where="--format", fix="use text, github or sarif")
    if form == "sarif" and (json or resolved):
        raise CompressError("--format sarif prints one document and nothing else", fix="leave out the other option")
    mistakes, errors = [], []
    for path in paths:
        try:
            _check(path, sets, data=data, resolved=resolved, json=json, quiet=form == "sarif")
        except CompressError as error:
            mistakes += ci.mistakes_of(error, str(path))
            errors.append(error)
    if form == "sarif":
        sys.stdout.write(ci.sarif(mistakes) + "\n")
    elif mistakes and (form == "github" or (form is None and ci.on_github() and not json)):
        sys.stdout.write("".join(f"{line}\n" for line in ci.github(mistakes)))
    for earlier in errors[:-1]:
        fail(str(earlier), earlier.exit_status)
    if errors:
        raise errors[-1]


def _check(path: Path, sets: Sequence[str], *, data: bool, resolved: bool, json: bool, quiet: bool) -> None:
    from compress.pipeline.check import check as check_recipe
    from compress.recipe import resolved as resolve
    from compress.recipe import to_yaml

    result = check_recipe(_any_recipe(path, sets), data=data)
    if json:
        print_json({"schema": "compress.check/1", "recipe": resolve(result.recipe)})
    elif resolved:
        sys.stdout.write(to_yaml(resolve(result.recipe)))
    elif not quiet:
        for line in result.lines(str(path)):
            say(line)


def _any_recipe(path: Path, sets: Sequence[str]) -> Recipe:
    """The recipe of a run; that of a sweep with the first value of each, every other one is checked too; that of a bound."""
    from compress.errors import RecipeError

    try:
        return load(path, sets)
    except RecipeError:
        from compress.recipe.bound import load_bound
        from compress.recipe.load import read_tree
        from compress.recipe.search import load_search

        root = read_tree(path, [])
        if root is None or not {"fit", "sweep"} & root.entries.keys():
            raise
        return load_bound(path, sets).recipe if "fit" in root.entries else load_search(path, sets).recipe


def plan(
    path: Path,
    sets: Sequence[str],
    *,
    preset: str | None,
    output: Path | None,
    minutes: bool,
    offline: bool,
    json: bool,
) -> None:
    """``compress plan``. Without ``minutes``, times are shown where the rates of this machine are known."""
    from compress.checkpoint.open import open_headers
    from compress.cli import tables
    from compress.pipeline.preflight import check_folders, check_sets
    from compress.planning import make_plan
    from compress.planning.hints import hints

    recipe = load_or_make(path, sets, preset, output, offline)
    with Located(recipe):
        check_folders(recipe)
        check_sets(recipe)
        spec, metadata = open_headers(
            recipe.reference,
            trust_remote_code=recipe.trust_remote_code,
            ignore_auto_map=recipe.ignore_auto_map,
            offline=recipe.offline,
        )
        made = make_plan(recipe, spec, metadata)
        planned = made.to_dict(_rates(recipe, minutes)) | {"hints": hints(recipe, made)}
        planned["exports"] = _planned_exports(recipe, made)
    planned["disk_free"] = shutil.disk_usage(_existing(Path(recipe.output))).free
    if json:
        print_json(planned)
    else:
        tables.print_plan(planned)


def _planned_exports(recipe: Recipe, made: Plan) -> list[dict[str, Any]]:
    """Rows of the exports; of a hub id, whose tokenizer is not here yet, without bytes."""
    if not recipe.export:
        return []
    from compress.files import expanded
    from compress.pipeline.exports import export_path, exports_of_plan

    folder = expanded(recipe.reference)
    if folder.is_dir():
        return exports_of_plan(recipe, made, folder)
    return [
        {"target": e.name, "path": str(export_path(Path(recipe.output), e)), "bytes": None, "exact": False}
        for e in recipe.export
    ]


def _rates(recipe: Recipe, measure: bool) -> Rates | None:
    """The rates of this machine for a recipe: those of an earlier measurement, else measured if asked to; None without."""
    from compress.work import cached_rates, computes_on_cpu

    if not computes_on_cpu(recipe.device) or recipe.dtype != "float32":
        return None
    if not measure:
        return cached_rates()
    from compress.blockwise.rates import kept_rates

    with progress(False) as shown:
        return kept_rates(shown)


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
