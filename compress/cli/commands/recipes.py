"""The commands that read a recipe: run, check, plan."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.cli.commands.common import Located, load, print_json, progress, say
from compress.cli.guard import Judged
from compress.files import expanded

if TYPE_CHECKING:
    from compress.recipe import Recipe
    from compress.spec.spec import Structure
    from compress.work import Rates


def run(
    path: Path, sets: Sequence[str], *, fresh: bool, publish_anyway: bool, offline: bool, json: bool, quiet: bool
) -> None:
    """``compress run``."""
    from compress.cli import tables
    from compress.pipeline.run import run as run_recipe

    recipe = load(path, [*sets, "offline=true"] if offline else sets)
    with Located(recipe):
        result = run_recipe(
            recipe, fresh=fresh, publish_anyway=publish_anyway, progress=progress(quiet), recipe_path=str(path)
        )
    if json:
        print_json(result.report)
    else:
        if result.nothing_to_do:
            say(f"nothing to do: {result.checkpoint} already holds this recipe's result (--fresh runs it again)")
        tables.print_report(result.report)
        if not result.published:
            say(f"not published; the result is in {result.checkpoint} (--publish-anyway publishes it)")
    raise Judged(result.exit_status)


def check(path: Path, sets: Sequence[str], *, data: bool, resolved: bool, json: bool) -> None:
    """``compress check``: check the recipe, its folders and columns, and the plan if its model is a local folder.

    With ``data`` the text is read too, and evaluation text is searched for in training and calibration text.
    """
    from compress.architectures.model_map import model_map
    from compress.pipeline.preflight import (
        check_folders,
        check_ids,
        check_plan,
        check_sets,
        check_tokenizer,
        check_window,
        hopeless_gates,
    )
    from compress.recipe import resolved as resolve
    from compress.recipe import to_yaml

    recipe = load(path, sets)
    local = expanded(recipe.reference)
    notes: list[str] = []
    structure: Structure | None = None
    with Located(recipe):
        check_folders(recipe)
        check_sets(recipe)
        if local.exists():
            from compress.checkpoint.open import open_headers
            from compress.evaluation.tasks import task_of
            from compress.planning import make_plan

            spec, metadata = open_headers(
                local, trust_remote_code=recipe.trust_remote_code, ignore_auto_map=recipe.ignore_auto_map
            )
            structure, planned = spec.structure, make_plan(recipe, spec, metadata)
            check_plan(recipe, planned)
            notes += [*spec.notes, *hopeless_gates(recipe, planned)]
            recipe = recipe.fitted(task_of(structure.class_name))
            check_window(recipe, spec)
            check_tokenizer(recipe, local)
        check_ids(recipe, model_map(spec).positions if local.exists() else None)
        notes += _read_data(recipe, structure, data)
    if json:
        print_json({"schema": "compress.check/1", "recipe": resolve(recipe)})
    elif resolved:
        sys.stdout.write(to_yaml(resolve(recipe)))
    else:
        hint = "" if local.exists() else " (its model is not a local folder: passes were not checked against it)"
        say(f"{path}: no mistakes found{hint}")
        for note in notes:
            say(note)


def _read_data(recipe: Recipe, structure: Structure | None, everything: bool) -> list[str]:
    """Read labelled texts and images, and with ``everything`` all text. Returns sentences about what was compared.

    Raises:
        DataError: the model does not have a label of the data, or evaluation and passes share text.
    """
    from compress.data.kinds import holds_ids
    from compress.pipeline.datasets import DataSets
    from compress.pipeline.preflight import check_chats

    data, evaluation = DataSets(recipe, expanded(recipe.reference), structure), recipe.data.evaluation
    if structure is not None and evaluation is not None and evaluation.given != "text":
        data.documents("evaluation")
    if not everything:
        return []
    if structure is None and recipe.data.needs_model:
        return ["data: not read, because labels and classes come from the model, which is not a local folder"]
    compared = data.check_disjoint(ids=False)
    for name in ("training", "calibration", "evaluation"):
        if (files := data.files(name)) and not holds_ids(files[0]):
            documents = data.documents(name)
            if structure is not None:
                check_chats(data.folder, documents)
    counts = [f"data: {len(data.documents('evaluation')):,} documents of evaluation"] if evaluation is not None else []
    counts += [f"{len(data.documents(name)):,} of {name}, none shared" for name in compared]
    return [", ".join(counts)] if counts else ["data: nothing to compare"]


def plan(path: Path, sets: Sequence[str], *, minutes: bool, offline: bool, json: bool) -> None:
    """``compress plan``. Without ``minutes``, times are shown where the rates of this machine are known."""
    from compress.checkpoint.open import open_headers
    from compress.cli import tables
    from compress.planning import make_plan

    recipe = load(path, [*sets, "offline=true"] if offline else sets)
    with Located(recipe):
        spec, metadata = open_headers(
            recipe.reference,
            trust_remote_code=recipe.trust_remote_code,
            ignore_auto_map=recipe.ignore_auto_map,
            offline=recipe.offline,
        )
        planned = make_plan(recipe, spec, metadata).to_dict(_rates(recipe, minutes))
    planned["disk_free"] = shutil.disk_usage(_existing(Path(recipe.output))).free
    if json:
        print_json(planned)
    else:
        tables.print_plan(planned)


def _rates(recipe: Recipe, measure: bool) -> Rates | None:
    """The rates of this machine for a recipe: those of an earlier measurement, else measured if asked to; None without."""
    from compress.work import cached_rates, computes_on_cpu, keep_rates

    if not computes_on_cpu(recipe.device) or recipe.dtype != "float32":
        return None
    if not measure:
        return cached_rates()
    from compress.blockwise.rates import measure_rates

    rates = measure_rates(progress(False))
    keep_rates(rates)
    return rates


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
