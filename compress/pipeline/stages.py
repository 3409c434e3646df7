"""The stages of a run: each reads a checkpoint, applies its passes, writes the result, checks it and records it.

A stage that an earlier run finished is reused. One that was killed half-way continues from its workspace
(`compress.workspace`); state that cannot be used is set aside, and the stage begins anew.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress import passes
from compress.architectures.unforeseen import refused
from compress.checkpoint.open import Stored, open_checkpoint
from compress.checkpoint.values import Checkpoint, Derived
from compress.checkpoint.write import Written, write_checkpoint
from compress.errors import CompressError, PassError, ResourceError, is_lack, one_line
from compress.files import remove
from compress.formatting import format_bytes
from compress.memory import compares_logits, give_back_freed, peak_memory, reset_peak
from compress.passes.details import PassDetails
from compress.pipeline.forecast import Forecast, predicted_seconds
from compress.pipeline.formats_alone import check_codes_config, formats_alone, streams
from compress.pipeline.state import Run
from compress.pipeline.workers import Job, dispatch
from compress.planning import PlannedPass, PlannedStage, Size, planned_size, size_on_disk
from compress.recipe.resolve import plain_settings
from compress.spec.spec import Spec
from compress.work import minutes_text


def run_stages(run: Run) -> list[dict[str, Any]]:
    """The report's row of every stage, reused or computed. Sets ``keys`` and ``files`` of the run."""
    prints = run.fingerprints()
    run.keys = [f"{p[:12]}-{'+'.join(q.name for q in s.passes)}" for p, s in zip(prints, run.plan.stages, strict=True)]
    run.folder.set_current(run.keys)
    if run.fresh:
        for key in run.keys:
            run.folder.drop(key)
            remove(run.folder.work(key))
    else:
        run.folder.bring(run.keys)
    known = _finished(run)
    missing = [s for s, row in zip(run.plan.stages, known, strict=True) if row is None]
    run.check_disk(missing)
    run.check_samples(missing)
    _prepare_passes(run, missing)
    if missing and missing[0] is run.plan.stages[0] and not _needs_no_class(run, missing):
        from compress.models.classes import has_class
        from compress.models.loading import check_keys

        if has_class(run.original):
            check_keys(run.original)  # the input loads cleanly
    rows, before = [], run.original
    run.predicted = predicted_seconds(run.plan, missing, run.device, run.recipe.dtype, run.progress)
    run.progress = forecast = Forecast(run.progress, dict(run.predicted))
    for stage, print_, key, row in zip(run.plan.stages, prints, run.keys, known, strict=True):
        title = " + ".join(p.name for p in stage.passes)
        run.progress.stage(stage.index, run.parts, title)
        reused = row is not None
        if row is None:
            with run.folder.claimed(key, run.progress) as row:
                if not (reused := row is not None):
                    run.folder.drop(key)
                    with refused(before.spec, title):
                        row = _resume(run, stage, before, print_, key)
        assert row is not None
        before = open_checkpoint(run.folder.stages / key, trust_remote_code=run.recipe.trust_remote_code)
        row["size"] = row["passes"][-1]["actual"] = asdict(size_on_disk(before))  # as it is, whatever a record says
        told = "reused from an earlier run" if reused else minutes_text(sum(row["seconds"].values()))
        run.progress.message(f"✓ {title}: {told}, {format_bytes(row['size']['bytes'])}")
        run.files = row.pop("files")
        rows.append({**row, "reused": reused, "folder": str(run.folder.stages / key)})
    if run.measures:
        forecast.evaluation(run.parts)
    return rows


def _finished(run: Run) -> list[dict[str, Any] | None]:
    """The record of each stage; None for a stage to compute.

    Files are compared by contents where they are read next: those of the last stage, and of one before a missing stage.
    """
    known = [run.folder.find(key) for key in run.keys]
    for i in reversed(range(len(known))):
        if known[i] is not None and (i + 1 == len(known) or known[i + 1] is None):
            known[i] = run.folder.find(run.keys[i], contents=True)
    return known


def _prepare_passes(run: Run, missing: list[PlannedStage]) -> None:
    """Let every pass of the missing stages refuse its data and other checkpoints, before the first pass works."""
    before = run.plan.original_spec
    for stage in run.plan.stages:
        for planned in stage.passes:
            if stage in missing:
                given = Derived(run.original, before, run.original.tensor)
                job = _job(run, planned, None, Path(os.devnull))
                context = job.context(run.original, run.data.batches, run.progress, run.processes)
                with _located(planned):
                    passes.get(planned.name).prepare(given, planned.settings, context)
            before = planned.spec


def _job(run: Run, planned: PlannedPass, folder: Path | None, work: Path) -> Job:
    recipe, original = run.recipe, run.original
    assert original.folder is not None
    return Job(
        name=planned.name,
        settings=planned.settings,
        folder=folder,
        original=original.folder,
        trust_remote_code=original.trust_remote_code,
        ignore_auto_map=original.ignore_auto_map,
        device=run.device,
        dtype=recipe.dtype,
        seed=recipe.seed,
        max_ram=recipe.max_ram,
        max_vram=recipe.max_vram,
        offline=recipe.offline,
        work=work,
    )


@dataclass(frozen=True)
class Applied:
    """A stage that was written and checked.

    Attributes:
        written: the writer's account. stored: the result, open. passes: each with its spec and its details for the report.
        check_seconds: time of the checks after writing.
    """

    written: Written
    stored: Stored
    passes: list[tuple[PlannedPass, Spec, PassDetails]]
    check_seconds: float


def apply_stage(
    run: Run, stage: PlannedStage, before: Stored, *, work: Path, folder: Path, data: Callable[[str], Any]
) -> Applied:
    """Apply the stage's passes in one read and one write, and check the result.

    Args:
        work: folder of the workspace. folder: where the result is written. data: gives a data set by name.

    Raises:
        CompressError: a pass fails, the disk is full, or the result is not what was computed; then ``folder`` may exist.
    """
    checkpoint: Checkpoint = before
    applied = []
    for planned in stage.passes:
        job = _job(run, planned, before.folder, work)
        context = job.context(run.original, data, run.progress, run.processes)
        dispatch(run.processes, job, data)
        with _located(planned):
            checkpoint = passes.get(planned.name).apply(checkpoint, planned.settings, context)
        applied.append((planned, checkpoint.spec, context.details))
    recipe = run.recipe
    written = write_checkpoint(
        checkpoint, folder, store=recipe.store, max_shard=recipe.max_shard_size, progress=run.progress
    )
    stored = open_checkpoint(written.folder, trust_remote_code=recipe.trust_remote_code)
    if not run.measures and streams([stage]) and formats_alone(before.spec, stored.spec):
        start = time.perf_counter()
        check_codes_config(stored)
        return Applied(written, stored, applied, time.perf_counter() - start)
    return Applied(written, stored, applied, check_result(stored, checkpoint, recipe.max_ram, before))


def _needs_no_class(run: Run, missing: list[PlannedStage]) -> bool:
    """Whether a run changes number formats alone, and measures nothing."""
    last = missing[-1].passes[-1].spec
    return not run.measures and streams(missing) and formats_alone(run.original.spec, last)


def _resume(run: Run, stage: PlannedStage, before: Stored, print_: str, key: str) -> dict[str, Any]:
    """Compute a stage, from the state of an earlier run where there is any; anew where that state cannot be used."""
    work = run.folder.work(key)
    resumed = work.is_dir() and any(work.iterdir()) and run.processes.world == 1
    try:
        return _compute(run, stage, before, print_, key)
    except Exception as error:
        if not resumed or not _is_of_state(error, work):
            raise
        aside = run.folder.set_aside(key)
        run.progress.message(
            f"the state of an earlier run cannot be used ({one_line(error)}) and is kept as {aside}; the stage begins anew"
        )
    return _compute(run, stage, before, print_, key)


def _compute(run: Run, stage: PlannedStage, before: Stored, print_: str, key: str) -> dict[str, Any]:
    """Compute a stage and record it."""
    start = time.perf_counter()
    reset_peak()
    from compress.blockwise.input_squares import gather_input_squares

    metadata, recipe, work = before.metadata, run.recipe, run.folder.work(key)
    try:
        done = apply_stage(run, stage, before, work=work, folder=run.folder.stages / key, data=run.data.batches)
    except BaseException:
        run.folder.drop(key)
        raise
    sizes = [planned_size(spec, recipe.store, recipe.max_shard_size, metadata) for _, spec, _ in done.passes]
    sizes[-1] = size_on_disk(done.stored)
    assert sizes[-1].bytes == done.written.bytes, (sizes[-1], done.written.bytes)
    gather_input_squares(work, run.folder.inputs(key))
    row = run.folder.finish(
        key,
        {
            "index": stage.index,
            "fingerprint": print_,
            "content": done.written.content,
            "passes": [
                _pass_row(planned, size, details)
                for (planned, _, details), size in zip(done.passes, sizes, strict=True)
            ],
            "size": asdict(sizes[-1]),
            "seconds": _times(start, done),
            "predicted_seconds": run.predicted.get(stage.index),
            "peak_memory": peak_memory(),
        },
    )
    remove(work)  # not before the record stands: a run that is killed here would have neither
    return row


def _pass_row(planned: PlannedPass, actual: Size, details: PassDetails) -> dict[str, Any]:
    return {
        "name": planned.name,
        "settings": plain_settings(planned.settings),
        "planned": asdict(planned.size),
        "actual": asdict(actual),
        "exact": planned.spec.exact,
        "details": details,
    }


def _times(start: float, done: Applied) -> dict[str, float]:
    verify = done.written.verify_seconds + done.check_seconds
    return {
        "apply_and_write": round(time.perf_counter() - start - verify, 3),
        "verify": round(verify, 3),
        "evaluate": 0.0,
    }


def _is_of_state(error: Exception, work: Path) -> bool:
    """Whether files of the workspace may have caused an error: it names one, or is neither the user's nor a lack of memory."""
    if isinstance(error, CompressError):
        return str(work) in str(error) and not isinstance(error, ResourceError)
    return not is_lack(error)


@contextlib.contextmanager
def _located(planned: PlannedPass) -> Iterator[None]:
    """Errors of a pass get its place in the recipe, ``passes.<index>.<name>``."""
    try:
        yield
    except PassError as error:
        error.where = error.where or f"passes.{planned.index}.{planned.name}"
        raise


def check_result(stored: Stored, handed: Checkpoint, max_ram: int | None, before: Checkpoint | None = None) -> float:
    """Check a written checkpoint: its keys against the stock class; its logits too, where two models fit in memory.

    Args:
        handed: the checkpoint that was to be written. before: what the passes began with.
        max_ram: memory for both models in bytes; None for half of what is free.

    Returns:
        Seconds it took.

    Raises:
        CheckpointError: they differ.
    """
    from compress.models.classes import has_class
    from compress.models.loading import check_keys
    from compress.models.sameness import same_logits
    from compress.models.stock import check_codes

    start = time.perf_counter()
    if not has_class(
        stored
    ):  # its tensors were compared while they were written, and a note says that nothing loads it
        return time.perf_counter() - start
    check_keys(stored)
    check_codes(stored)
    give_back_freed()
    if compares_logits(stored.spec.parameters, max_ram):
        same_logits(handed, stored, before)
    return time.perf_counter() - start
