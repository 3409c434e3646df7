"""Tokens per second of the original and the result, in turns, in the runtime that serves them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.runtimes import unopened
from compress.checkpoint.storage.compressed_tensors.servers import VLLM, refusals
from compress.checkpoint.store import needs_code, with_storage
from compress.errors import CompressError
from compress.evaluation import runtime_worker
from compress.evaluation.tasks import LANGUAGE, task_of
from compress.evaluation.throughput_settings import RUNTIMES, ThroughputSettings
from compress.evaluation.worker import in_turns, started
from compress.exports import export, get
from compress.files import aside, remove
from compress.planning.sizes import size_on_disk

if TYPE_CHECKING:
    from compress.checkpoint.open import Stored
    from compress.pipeline.state import Run
    from compress.progress import Progress
    from compress.recipe import Recipe
    from compress.settings import Settings
    from compress.spec.spec import Spec


def throughput_settings(recipe: Recipe) -> ThroughputSettings | None:
    """The settings of a recipe's throughput; None where it is not measured."""
    if "throughput" not in recipe.metrics:
        return None
    settings = recipe.settings_of("throughput")
    assert isinstance(settings, ThroughputSettings)
    return settings


def check_throughput(run: Run) -> None:
    """Refuse what cannot be measured, before any work. Raises `CompressError`."""
    if (settings := throughput_settings(run.recipe)) is None:
        return
    structure, folder = run.original.spec.structure, run.original.folder
    if task_of(structure.class_name) is not LANGUAGE:
        raise CompressError(
            f"throughput counts generated tokens, and {structure.class_name} generates none",
            fix="leave out `throughput`",
        )
    settings.require()
    target = RUNTIMES[settings.runtime].target
    assert folder is not None
    result = with_storage(run.plan.stages[-1].passes[-1].spec, run.recipe.store)
    if target is None:
        _check_served(run.original.spec, "the original")
        _check_served(result, "the result")
        return
    get(target).require()
    get(target).plan(run.original.spec, folder, get(target).settings())
    get(target).plan(result, folder, _export_settings(run.recipe, target))


def _check_served(spec: Spec, what: str) -> None:
    """Raise `CompressError` where vLLM does not open a checkpoint on a CPU, by its rules and by what was tried."""
    if spec.structure.compact or needs_code(spec):
        raise CompressError(f"throughput: vLLM opens no compact checkpoint, as {what} is", fix="use `store: stock`")
    reasons = refusals(spec, VLLM)
    reasons += [f"no kernel of CPUs for {held}" for held in unopened(spec, "vLLM")]
    if reasons:
        raise CompressError(
            f"throughput: vLLM does not open {what}: {'; '.join(reasons)}",
            fix="leave `throughput` out, or cast to int4",
        )


def _export_settings(recipe: Recipe, target: str) -> Settings:
    """The settings of the recipe's own export to a target, else its defaults."""
    given = next((entry.settings for entry in recipe.export if entry.name == target), None)
    return get(target).settings() if given is None else given


def measure_throughput(
    recipe: Recipe, checkpoints: tuple[Stored, Stored], place: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Measure the original and the result in turns.

    Args:
        checkpoints: both, open. place: a path for their exports, which are removed at the end.

    Returns:
        ``original`` and ``candidate``, each as `compress.report.throughput_schema.Throughput` has it.

    Raises:
        CompressError: an export fails, or the runtime does not open it.
    """
    settings = throughput_settings(recipe)
    assert settings is not None
    if RUNTIMES[settings.runtime].target is None:
        folders = [(stored.folder, size_on_disk(stored).bytes) for stored in checkpoints]
        return _measured(recipe, settings, folders, progress)
    made = aside(place)
    made.mkdir(parents=True)
    try:
        return _measured(recipe, settings, _exported(recipe, settings, checkpoints, made, progress), progress)
    finally:
        remove(made)


def _exported(
    recipe: Recipe, settings: ThroughputSettings, checkpoints: tuple[Stored, Stored], made: Path, progress: Progress
) -> list[tuple[Path, int]]:
    """Exports of both checkpoints in the folder ``made``, with their bytes."""
    name = RUNTIMES[settings.runtime].target
    assert name is not None
    target = get(name)
    artefacts = []
    for side, checkpoint, chosen in zip(
        ("original", "result"), checkpoints, (target.settings(), _export_settings(recipe, name)), strict=True
    ):
        path = made / f"{side}{target.ending}"
        artefacts.append((path, export(checkpoint, name, path, chosen, progress).bytes))
    return artefacts


def _measured(
    recipe: Recipe, settings: ThroughputSettings, artefacts: list[tuple[Path, int]], progress: Progress
) -> dict[str, dict[str, Any]]:
    threads = recipe.threads or len(os.sched_getaffinity(0))
    counts = {"prompt": settings.prompt, "generated": settings.generated, "threads": threads}
    asked = json.dumps({**counts, "place": str(settings.place), "trust_remote_code": recipe.trust_remote_code})
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(started(*_command(settings, path, asked), f"the throughput of {settings.runtime}"))
            for path, _ in artefacts
        ]
        versions = [worker.answer()["version"] for worker in workers]
        samples = in_turns(workers, {}, "throughput", progress, settings.rounds)
    sides: list[dict[str, Any]] = []
    for (_, size), version, seconds in zip(artefacts, versions, samples, strict=True):
        rates = {
            "prefill": [settings.prompt / each for each in seconds["prefill"]],
            "decode": [1 / each for each in seconds["decode"]],
        }
        facts = {"runtime": settings.runtime, "version": str(version), "bytes": size, **counts}
        facts["variables"] = settings.variables
        sides.append({**facts, "rounds": len(rates["decode"]), **_summary(rates, sides, recipe.seed)})
    return dict(zip(("original", "candidate"), sides, strict=True))


def _summary(rates: dict[str, list[float]], before: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Medians of rates; of the second side also the ratios to the first."""
    from compress.statistics import median_ratio, quantile

    result: dict[str, Any] = {}
    for name, samples in rates.items():
        result[name] = {"median": quantile(samples, 0.5), "samples": samples}
        if before:
            ratio = median_ratio(before[0][name]["samples"], samples, confidence=0.95, bootstrap=2000, seed=seed)
            result[name] |= {"ratio": ratio.value, "lower": ratio.lower, "upper": ratio.upper}
    return result


def _command(settings: ThroughputSettings, path: Path, asked: str) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a worker."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **settings.variables}
    arguments = [settings.runtime, str(path), asked]
    if settings.runtime == "llama.cpp":  # a library, which this Python opens
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        return [sys.executable, "-m", runtime_worker.__name__, *arguments], environment
    python = str(settings.place / "bin" / "python")
    return [python, "-I", str(Path(runtime_worker.__file__)), *arguments], environment
