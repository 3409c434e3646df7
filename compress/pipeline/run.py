"""A run: plan ▶ stages ▶ evaluation ▶ gates ▶ report ▶ publication."""

from __future__ import annotations

import contextlib
import datetime
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import passes
from compress.checkpoint.open import open_headers
from compress.checkpoint.running import loading_notes
from compress.errors import EXIT_INCONCLUSIVE, EXIT_OK
from compress.evaluation.metrics.base import Resampling
from compress.files import disk_errors, remove_leftovers
from compress.passes.distill.plan import unhelped
from compress.pipeline.closing import close, published_report
from compress.pipeline.evaluations import Evaluations
from compress.pipeline.exports import check_exports, planned_exports, write_exports
from compress.pipeline.fingerprint import versions
from compress.pipeline.machine import machine, resolve_device
from compress.pipeline.publish import recover
from compress.pipeline.results import RunReport, RunResult
from compress.pipeline.shared import SharedWork
from compress.pipeline.stages import run_stages
from compress.pipeline.state import Run
from compress.pipeline.throughput import check_throughput
from compress.pipeline.trackers import track
from compress.pipeline.workers import process_group, worker_loop
from compress.planning import Plan, size_on_disk
from compress.progress import Progress, SilentProgress
from compress.recipe import resolved
from compress.report import append_step_summary
from compress.work import minutes_text

if TYPE_CHECKING:
    from compress.recipe import Recipe


def run(
    recipe: Recipe,
    *,
    fresh: bool = False,
    publish_anyway: bool = False,
    shared: Path | None = None,
    progress: Progress | None = None,
    recipe_path: str | None = None,
) -> RunResult:
    """Run a recipe. See `RunResult`; the report is also written to the run folder.

    Under torchrun the first process runs the recipe, and the others help; they end here when it is done (SystemExit).

    Args:
        fresh: compute every stage and measurement anew.
        publish_anyway: publish although a gate failed or was inconclusive (the verdict stays).
        shared: a folder of stages and measurements that other runs share: what it holds is taken, what it lacks is put there.

    Raises:
        CompressError: the recipe cannot run here; nothing at the output has changed.
    """
    with process_group(resolve_device(recipe.device)) as processes:
        if processes.rank:
            worker_loop(processes)
            raise SystemExit(0)
        state = Run(
            recipe,
            progress or SilentProgress(),
            fresh,
            processes,
            shared=None if shared is None else SharedWork.at(shared),
        )
        result = _run(state, publish_anyway, recipe_path)
        processes.broadcast_object(0, None)
    return result


def require_runnable(recipe: Recipe, progress: Progress) -> None:
    """Refuse what `run` refuses before any work: folders, data, samples, memory by plan, missing programs.

    Raises:
        CompressError: as `run`.
    """
    with process_group(resolve_device(recipe.device)) as processes:
        if not processes.rank:
            _prepare(Run(recipe, progress, False, processes))


def _prepare(run: Run) -> None:
    run.prepare()
    check_exports(run)
    check_throughput(run)


def _run(run: Run, publish_anyway: bool, recipe_path: str | None) -> RunResult:
    """The whole run, in the first process."""
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    _prepare(run)
    with disk_errors(run.folder.path, "cannot be used"), run.folder.locked():
        recover(run.output)
        remove_leftovers(run.output)
        identity = run.identity()
        if not run.fresh and (done := published_report(run, identity)) is not None:
            with contextlib.suppress(Exception):  # a summary is no reason to lose a finished run
                append_step_summary(done)
            write_exports(run)
            return RunResult(run.output, RunReport(done), done["status"], done["exit_status"], True, nothing_to_do=True)
        evaluations = Evaluations(run.recipe, run.data, run.folder, run.device, run.progress, run.fresh)
        evaluations.begin(run.original)
        rows = run_stages(run)
        measuring = time.perf_counter()
        evaluations.add(run.original, rows)
        verdict = _judge(run, evaluations, rows)
        if run.measures:
            run.progress.message(f"✓ evaluation: {minutes_text(time.perf_counter() - measuring)}")
        published = verdict.exit_status == EXIT_OK or publish_anyway
        report = RunReport(
            {
                "schema": "compress.report/1",
                "versions": versions(),
                "machine": machine(run.device),
                "recipe": {"path": recipe_path, "fingerprint": identity, "resolved": resolved(run.recipe)},
                "started": started.isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - clock, 3),
                "status": verdict.status,
                "exit_status": verdict.exit_status,
                "output": str(run.output),
                "published": published,
                "run_folder": str(run.folder.path),
                "data": evaluations.data_summary(),
                "original": verdict.original,
                "stages": rows,
                "result": verdict.result,
                "gates": verdict.gates,
                "exports": planned_exports(run, Path(rows[-1]["folder"])) if published else [],
                "notes": [
                    *run.notes,
                    *verdict.notes,
                    *evaluations.notes,
                    *loading_notes(open_headers(rows[-1]["folder"], trust_remote_code=True)[0]),
                ],
            }
        )
        close(run, report, identity)
        track(run.recipe, report, run.progress)
        if published:
            write_exports(run)
    checkpoint = run.output if published else Path(rows[-1]["folder"])
    return RunResult(checkpoint, report, verdict.status, verdict.exit_status, published)


@dataclass(frozen=True)
class _Verdict:
    """The verdict of a run and the values that it was judged by, as the report holds them."""

    status: str
    exit_status: int
    original: dict[str, Any]
    result: dict[str, Any]
    gates: list[dict[str, Any]]
    notes: list[str]


def _judge(run: Run, evaluations: Evaluations, rows: list[dict[str, Any]]) -> _Verdict:
    """Judge the gates. Without any, a training that did not help makes the run inconclusive, unless it is allowed."""
    from compress.evaluation.positions import paired
    from compress.gates import judge, verdict

    recipe = run.recipe
    original: dict[str, Any] = {
        "checkpoint": recipe.model,
        "size": asdict(size_on_disk(run.original)),
        "evaluation": evaluations.original,
        "latency": evaluations.original_latency,
        "throughput": evaluations.original_throughput,
        "lm_eval": evaluations.original_tasks,
    }
    result = {key: rows[-1].get(key) for key in ("size", "evaluation", "latency", "throughput", "lm_eval")}
    resampling = Resampling(recipe.confidence, recipe.bootstrap, recipe.seed)
    result["positions"] = paired(original["evaluation"], result["evaluation"], resampling)
    gates = recipe.gates.model_dump(exclude_none=True)
    judged = (
        judge(gates, original, result, confidence=recipe.confidence, bootstrap=recipe.bootstrap, seed=recipe.seed)
        if gates
        else []
    )
    status, exit_status = verdict(judged) if judged else ("no gates", EXIT_OK)
    notes, idle = _trainings_that_did_not_help(run.plan, rows)
    if not judged and idle:
        status, exit_status = "inconclusive", EXIT_INCONCLUSIVE
    return _Verdict(status, exit_status, original, result, [g.to_dict() for g in judged], notes)


def _trainings_that_did_not_help(plan: Plan, rows: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """A note for the report on each, and whether one was all that its pass does and the recipe does not allow that."""
    notes, idle = [], False
    for stage, row in zip(plan.stages, rows, strict=True):
        for planned, done in zip(stage.passes, row["passes"], strict=True):
            note = unhelped(planned.name, done["details"].get("training", {}))
            if note is not None:
                notes.append(note)
                idle = idle or (passes.get(planned.name).mode == "train" and not planned.settings.allow_noop)
    return notes, idle
