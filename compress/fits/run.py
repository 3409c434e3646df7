"""A whole search: bound ▶ trials ▶ the recipe of the best combination ▶ its run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.checkpoint.open import open_checkpoint
from compress.data.batches import Batches
from compress.errors import CompressError, DataError
from compress.evaluation.tasks import LANGUAGE, task_of
from compress.files import place, remove, write_atomically, write_record
from compress.fits.families import Making, text
from compress.fits.forecast import search_times
from compress.fits.held_out import other_samples
from compress.fits.page import render_fit
from compress.fits.rank import Ranked
from compress.fits.search import PlannedBytes, Search
from compress.fits.trials import TrialRunner, Tried
from compress.formatting import format_bytes
from compress.passes.work import SampleSize
from compress.pipeline.datasets import DataSets
from compress.pipeline.fingerprint import hash_input
from compress.pipeline.folder import RunFolder
from compress.pipeline.machine import resolve_device
from compress.pipeline.preflight import check_folders
from compress.pipeline.run import require_runnable
from compress.pipeline.run import run as run_recipe
from compress.planning import size_on_disk
from compress.progress import Progress
from compress.recipe import Recipe, recipe_from_mapping, to_yaml
from compress.recipe.fit import Bound
from compress.work import minutes_text

if TYPE_CHECKING:
    from compress.checkpoint.open import Stored
    from compress.pipeline.results import RunResult

#: Keys of a recipe that its trials have.
_OF_TRIALS = (
    "model", "store", "seed", "device", "dtype", "max_ram", "max_vram", "threads", "document_separator", "data",
    "trust_remote_code", "ignore_auto_map", "allow_links", "offline",
)  # fmt: skip
#: Samples that no pass sees, as a share of the calibration samples, and how many at most.
_HELD_OUT, _MOST = 0.25, 24


@dataclass(frozen=True)
class FitResult:
    """The result of a search.

    Attributes:
        document: JSON values, schema ``compress.fit/1``. recipe: file of the best combination's recipe.
        run: of that recipe; None where it was only asked for.
    """

    document: dict[str, Any]
    recipe: Path
    run: RunResult | None


def fit(
    settings: Bound, mapping: Mapping[str, Any], progress: Progress, *, only_search: bool = False, fresh: bool = False
) -> FitResult:
    """Find the best combination within a bound, and run it.

    Args:
        mapping: a recipe's keys without `passes` and `fit`. only_search: write the recipe, and do not run it.
        fresh: measure anew.

    Raises:
        CompressError: the model, its data or the bound do not allow a search; nothing at the output has changed.
    """
    start = time.perf_counter()
    stand_in = {"passes": [{"cast": {"weights": "int4", "effort": "fast"}}], "gates": _gates(settings, mapping)}
    recipe = recipe_from_mapping({**mapping, **stand_in})
    check_folders(recipe)
    original = open_checkpoint(
        recipe.reference,
        trust_remote_code=recipe.trust_remote_code,
        ignore_auto_map=recipe.ignore_auto_map,
        offline=recipe.offline,
    )
    before = size_on_disk(original).bytes
    most = settings.most(before)
    _check(recipe, original, settings, most, before)
    require_runnable(recipe, progress)
    output = place(recipe.output)
    folder = RunFolder(output.with_name(f"{output.name}.fit"))
    with folder.locked():
        if fresh:
            for record in (folder.path / "trials").glob("*.json"):
                record.unlink()
        trials, samples = _trials(recipe, original, mapping, folder.path)
        sizes = PlannedBytes(original.spec, recipe.store, recipe.max_shard_size)
        search = Search(most, settings, sizes, trials, samples, progress)
        search.require_possible()
        progress.message(f"{format_bytes(before)} ▶ at most {format_bytes(most)}; trials are kept in {folder.path}")
        if (times := search_times(search, recipe.device, recipe.dtype)) is not None:
            progress.message(times.text)
        ranking = search.measure()
        done = search.final(ranking)
        best = done[0][0]
        made = _recipe(mapping, search, best, recipe)
        file = folder.path / "recipe.yaml"
        write_atomically(file, to_yaml(made).encode())
        document = _document(search, ranking, done, made, before, time.perf_counter() - start)
        write_record(folder.path / "fit.json", document["schema"], document)
        write_atomically(folder.path / "fit.html", render_fit(document, to_yaml(made)).encode())
        took = minutes_text(time.perf_counter() - start)
        progress.message(
            f"✓ search: {took}, {trials.made} trials; {text(best.choice, original.spec)}, {best.bits:.2f} bits"
        )
    try:
        result = None if only_search else _result(made, file, trials.finished, progress, fresh)
    finally:
        remove(trials.finished)
    return FitResult(document, file, result)


def _result(made: Mapping[str, Any], file: Path, finished: Path, progress: Progress, fresh: bool) -> RunResult:
    """The run of the best combination's recipe; the best finalist is its stage where their efforts agree."""
    shared = finished if finished.exists() else None
    return run_recipe(recipe_from_mapping(made), progress=progress, recipe_path=str(file), fresh=fresh, shared=shared)


def _check(recipe: Recipe, original: Stored, settings: Bound, most: int, before: int) -> None:
    """Refuse what a search cannot do, before any work. Raises `CompressError`."""
    if most >= before:
        raise CompressError(
            f"the original has {format_bytes(before)}, no more than the bound of {format_bytes(most)}",
            where="fit.max_bytes",
            fix="allow fewer bytes",
        )
    if task_of(original.spec.structure.class_name) is not LANGUAGE or not model_map(original.spec).known:
        raise CompressError(
            f"{original.spec.structure.class_name or original.spec.structure.model_type} is no causal language model that "
            "this version knows, and a search compares predictions of the next token",
            where="fit",
            fix="give `passes`",
        )
    if recipe.data.calibration is None:
        raise DataError("a search reads calibration text", where="data.calibration", fix="name a text file")
    if settings.tokens and recipe.data.training is None:
        raise DataError("`tokens` trains on text", where="data.training", fix="name a text file")
    if settings.max_increase is not None and recipe.data.evaluation is None:
        raise DataError("`max_increase` is a gate, which needs text", where="data.evaluation", fix="name a text file")


def _trials(recipe: Recipe, original: Stored, mapping: Mapping[str, Any], path: Path) -> tuple[TrialRunner, int]:
    """The runner of trials, and the number of their calibration samples; others are held out."""
    from safetensors.torch import save_file

    assert original.folder is not None
    data = DataSets(recipe, original.folder, original.spec.structure, model_map(original.spec).positions)
    ids = data.batches("calibration").ids
    if len(ids) < 4:
        raise DataError(
            f"there are {len(ids)} calibration samples, and a search takes 4 at least", where="data.calibration"
        )
    count = min(_MOST, max(1, round(_HELD_OUT * len(ids))))
    held = other_samples(data, ids, count)
    if own := held is not None:
        samples = {"calibration": ids, "held_out": held}
    else:
        samples = {"calibration": ids[:-count].contiguous(), "held_out": ids[-count:].contiguous()}
    file = path / "samples.safetensors"
    save_file(samples, file)
    identity = hash_input(original, path / "inputs.json") + data.fingerprint("calibration")
    identity += Batches(samples["held_out"]).sha256()
    identity += data.fingerprint("training") if recipe.data.training is not None else ""
    base = {key: mapping[key] for key in _OF_TRIALS if key in mapping}
    held_out = SampleSize(count, ids.shape[1])
    runner = TrialRunner(path, base, identity, file, resolve_device(recipe.device), held_out, own=own)
    return runner, len(samples["calibration"])


def _recipe(mapping: Mapping[str, Any], search: Search, best: Ranked, recipe: Recipe) -> dict[str, Any]:
    """The recipe of the best combination, with gates on its bytes and on the metric of the task."""
    settings = search.settings
    made = {**mapping, "passes": search.entries(best.choice, Making(settings.effort, settings.tokens))}
    made["gates"] = {"size": {"max": search.most}} | _gates(settings, mapping)
    return made


def _gates(settings: Bound, mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's own gates, and that of `max_increase`."""
    gates: dict[str, Any] = {}
    if (allowed := settings.max_increase) is not None:
        gates["bits_per_byte"] = {"max_increase": f"{100 * allowed.value:g}%" if allowed.relative else allowed.value}
    return gates | dict(mapping.get("gates", {}))


def _document(
    search: Search,
    ranking: Sequence[Ranked],
    done: Sequence[tuple[Ranked, Tried]],
    made: Mapping[str, Any],
    before: int,
    seconds: float,
) -> dict[str, Any]:
    """The search as JSON values."""
    assert search.curve is not None
    best = done[0][0]
    points = [] if search.trellis is None else search.trellis.points
    trellis = [[bits, cost, search.alone({}, bits)] for bits, cost in points]
    return {
        "schema": "compress.fit/1",
        "model": str(made["model"]),
        "original": before,
        "bound": search.most,
        "seconds": round(seconds, 1),
        "trials": search.trials.made,
        "bits": [[bits, cost, search.alone({}, bits)] for bits, cost in search.curve.points],
        "families": {
            f: [[amount, cost, search.alone({f: amount})] for amount, cost in costs.items()]
            for f, costs in search.costs.items()
        }
        | ({"trellis": trellis} if trellis else {}),
        "left_out": dict(search.left_out),
        "ranked": [_row(one) for one in ranking[:20]],
        "finalists": [
            _row(one) | {"bytes": tried.bytes, "measured": tried.divergence, "divergences": list(tried.divergences)}
            for one, tried in done
        ],
        "chosen": dict(best.choice) | {"bits": best.bits},
        "text": text(best.choice, search.spec),
        "paid": search.paid(best.choice),
        "passes": made["passes"],
    }


def _row(one: Ranked) -> dict[str, Any]:
    return {"choice": dict(one.choice), "bits": one.bits, "expected": one.divergence}
