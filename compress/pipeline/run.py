"""A run: plan ▶ stages ▶ evaluation ▶ gates ▶ report ▶ publication."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import passes
from compress.architectures.model_map import model_map
from compress.checkpoint.open import Stored, open_checkpoint, open_headers
from compress.checkpoint.running import loading_notes
from compress.checkpoint.values import Checkpoint, Derived
from compress.checkpoint.write import Written, write_checkpoint
from compress.distributed import ProcessGroup
from compress.errors import EXIT_INCONCLUSIVE, EXIT_OK, CompressError, PassError, ResourceError, is_lack, one_line
from compress.evaluation.tasks import TEXT_METRICS, task_of
from compress.files import disk_errors, place, remove, remove_leftovers
from compress.memory import available_memory, peak_memory, reset_peak
from compress.passes.base import Context
from compress.passes.distill.plan import unhelped
from compress.pipeline.closing import close, published_report
from compress.pipeline.datasets import DataSets
from compress.pipeline.fingerprint import fingerprint, hash_input, stage_fingerprint, versions
from compress.pipeline.folder import RunFolder
from compress.pipeline.measure import Measurements
from compress.pipeline.preflight import check_folders, check_plan, check_sets, check_window
from compress.pipeline.publish import recover
from compress.pipeline.workers import dispatch, own_device, process_group, worker_loop
from compress.planning import Plan, PlannedPass, PlannedStage, make_plan, planned_size, size_on_disk
from compress.progress import Progress, SilentProgress
from compress.recipe.resolve import plain_settings
from compress.workspace import Workspace

if TYPE_CHECKING:
    from compress.recipe import Recipe


#: What models are computed in.
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RunResult:
    """What a run gave.

    Attributes:
        checkpoint: the published output, or the last stage's folder where it was not published.
        report: the report's dictionary (schema ``compress.report/1``).
        verdict: ``passed``, ``failed``, ``inconclusive``, or ``no gates``.
        exit_status: what the command line ends with.
    """

    checkpoint: Path
    report: dict[str, Any]
    verdict: str
    exit_status: int
    published: bool
    nothing_to_do: bool = False


@dataclass
class Run:
    """The state of one run; `run` drives it."""

    recipe: Recipe
    progress: Progress
    fresh: bool = False
    processes: ProcessGroup = field(default_factory=ProcessGroup)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.output = place(self.recipe.output)
        self.folder = RunFolder.of(self.output)
        self.device = resolve_device(self.recipe.device)

    def prepare(self) -> None:
        """Open, plan, and refuse what cannot work, before any work."""
        recipe = self.recipe
        check_folders(recipe)
        check_sets(recipe)
        self.original = open_checkpoint(
            recipe.model,
            trust_remote_code=recipe.trust_remote_code,
            ignore_auto_map=recipe.ignore_auto_map,
            offline=recipe.offline,
        )
        assert self.original.folder is not None
        spec = self.original.spec
        self.notes += spec.notes
        self.recipe = recipe = recipe.fitted(task_of(spec.structure.class_name))
        self.data = DataSets(recipe, self.original.folder, spec.structure, model_map(spec).positions)
        self.plan = make_plan(recipe, self.original.spec, self.original.metadata)
        check_plan(recipe, self.plan)
        check_window(recipe, spec)
        self.data.check_disjoint()
        for name in sorted(set().union(*(passes.get(p.name).required_data(p.settings) for p in recipe.passes))):
            self.data.check_ids(name)

    def check_disk(self, missing: list[PlannedStage]) -> None:
        """The file system has room for the stages that will be written."""
        parent = self.output.absolute().parent
        while not parent.exists():
            parent = parent.parent
        need = sum(stage.size.bytes for stage in missing)
        if need > (free := shutil.disk_usage(parent).free):
            raise ResourceError(
                f"the run writes {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
                where=str(parent),
                fix="free some space, or see `compress clean`",
            )

    def check_samples(self, missing: list[PlannedStage]) -> None:
        """What the stages to compute will read can be drawn, and what is measured on can be shown, before any pass works."""
        planned = [p for stage in missing for p in stage.passes]
        for name in sorted(set().union(*(passes.get(p.name).required_data(p.settings) for p in planned))):
            self.data.batches(name)
        if planned and TEXT_METRICS & set(self.recipe.metrics):
            self.data.check_shown()

    def fingerprints(self) -> list[str]:
        """One per stage, each covering all before it."""
        recipe = self.recipe
        before = hash_input(self.original, self.folder.path / "inputs.json")
        self.input_hash = before
        result = []
        for stage in self.plan.stages:
            needed = sorted(set().union(*(passes.get(p.name).required_data(p.settings) for p in stage.passes)))
            environment: dict[str, Any] = {
                "store": recipe.store,
                "max_shard_size": recipe.max_shard_size,
                "seed": recipe.seed,
                "versions": versions(),
            }
            if needed:
                environment |= {"device": self.device, "dtype": recipe.dtype}
            others = [name for p in stage.passes for name in passes.get(p.name).checkpoints(p.settings)]
            if others:
                environment["checkpoints"] = [self._hash(name) for name in others]
            before = stage_fingerprint(
                before,
                [(p.name, p.settings.model_dump(mode="json")) for p in stage.passes],
                {name: self.data.fingerprint(name) for name in needed},
                environment,
            )
            result.append(before)
        return result

    def _hash(self, name: str) -> str:
        """SHA-256 of another checkpoint's contents."""
        recipe = self.recipe
        found = open_checkpoint(
            name,
            trust_remote_code=recipe.trust_remote_code,
            ignore_auto_map=recipe.ignore_auto_map,
            offline=recipe.offline,
        )
        return hash_input(found, self.folder.path / f"inputs-{fingerprint(name)[:12]}.json")

    def prepare_passes(self, missing: list[PlannedStage]) -> None:
        """What data and other checkpoints rule out is refused before the first pass works."""
        before = self.plan.original_spec
        for stage in self.plan.stages:
            for planned in stage.passes:
                if stage in missing:
                    given = Derived(self.original, before, self.original.tensor)
                    with _of_pass(planned):
                        passes.get(planned.name).prepare(
                            given, planned.settings, self.context(planned, Path(os.devnull))
                        )
                before = planned.spec

    def context(self, planned: PlannedPass, work: Path) -> Context:
        """What a pass of this run may know."""
        shared = passes.get(planned.name).mode_for(planned.settings) != "stream"  # else this process works alone
        return Context(
            original=self.original,
            device=own_device(self.device),
            dtype=self.recipe.dtype,
            seed=self.recipe.seed,
            max_ram=self.recipe.max_ram,
            data=self.data.batches,
            progress=self.progress,
            workspace=Workspace(work, self.processes if shared else ProcessGroup()),
            offline=self.recipe.offline,
        )

    def compute(self, stage: PlannedStage, before: Stored, print_: str, key: str) -> dict[str, Any]:
        """Run the stage's passes in one read and one write, check the result, record it."""
        start = time.perf_counter()
        reset_peak()
        metadata = before.metadata
        checkpoint: Checkpoint = before
        rows = []
        for planned in stage.passes:
            context = self.context(planned, self.folder.work(key))
            if passes.get(planned.name).mode_for(planned.settings) != "stream":
                dispatch(self.processes, planned.name, planned.settings, before.folder, context)
            with _of_pass(planned):
                checkpoint = passes.get(planned.name).apply(checkpoint, planned.settings, context)
            rows.append((planned, checkpoint.spec, context.details))
        written = write_checkpoint(
            checkpoint,
            self.folder.stages / key,
            store=self.recipe.store,
            max_shard=self.recipe.max_shard_size,
            progress=self.progress,
        )
        stored = open_checkpoint(written.folder, trust_remote_code=self.recipe.trust_remote_code)
        try:
            verified = check_result(stored, checkpoint, self.recipe.max_ram)
        except BaseException:
            self.folder.drop(key)
            raise
        sizes = [
            asdict(planned_size(spec, self.recipe.store, self.recipe.max_shard_size, metadata)) for _, spec, _ in rows
        ]
        sizes[-1] = asdict(size_on_disk(stored))
        assert sizes[-1]["bytes"] == written.bytes, (sizes[-1], written.bytes)
        row = self.folder.finish(
            key,
            {
                "index": stage.index,
                "fingerprint": print_,
                "content": written.content,
                "passes": [
                    {
                        "name": planned.name,
                        "settings": plain_settings(planned.settings),
                        "planned": asdict(planned.size),
                        "actual": size,
                        "exact": planned.spec.exact,
                        "details": details,
                    }
                    for (planned, _, details), size in zip(rows, sizes, strict=True)
                ],
                "size": sizes[-1],
                "seconds": _times(start, written, verified),
                "peak_memory": peak_memory(),
            },
        )
        remove(self.folder.work(key))  # not before the record stands: a run that is killed here would have neither
        return row

    def _computed(self, stage: PlannedStage, before: Stored, print_: str, key: str) -> dict[str, Any]:
        """Compute a stage; from its beginning where the state that an earlier run left cannot be used."""
        work = self.folder.work(key)
        resumed = work.is_dir() and any(work.iterdir()) and self.processes.world == 1
        try:
            return self.compute(stage, before, print_, key)
        except Exception as error:
            if not resumed or not _is_of_state(error, work):
                raise
            aside = self.folder.set_aside(key)
            self.progress.message(
                f"the state of an earlier run cannot be used ({one_line(error)}) and is kept as {aside}; the stage begins anew"
            )
        return self.compute(stage, before, print_, key)

    def stages(self) -> list[dict[str, Any]]:
        """Every stage, reused or computed, as rows of the report."""
        prints = self.fingerprints()
        keys = [f"{p[:12]}-{'+'.join(q.name for q in s.passes)}" for p, s in zip(prints, self.plan.stages, strict=True)]
        self.keys = keys
        self.folder.set_current(keys)
        if self.fresh:
            for key in keys:
                self.folder.drop(key)
                remove(self.folder.work(key))
        found = self._found(keys)
        missing = [s for s, row in zip(self.plan.stages, found, strict=True) if row is None]
        self.check_disk(missing)
        self.check_samples(missing)
        self.prepare_passes(missing)
        self.checked_input = False
        rows, before = [], self.original
        for stage, print_, key, row in zip(self.plan.stages, prints, keys, found, strict=True):
            title = " + ".join(p.name for p in stage.passes)
            self.progress.stage(stage.index, len(self.plan.stages), title)
            if reused := row is not None:
                self.progress.message(f"{title}: reused from an earlier run")
            else:
                self.folder.drop(key)
                self._check_input(before)
                row = self._computed(stage, before, print_, key)
            assert row is not None
            before = open_checkpoint(self.folder.stages / key, trust_remote_code=self.recipe.trust_remote_code)
            row["size"] = row["passes"][-1]["actual"] = asdict(
                size_on_disk(before)
            )  # what is there, not what a record says
            self.files = row.pop("files")
            rows.append({**row, "reused": reused, "folder": str(self.folder.stages / key)})
        return rows

    def _found(self, keys: list[str]) -> list[dict[str, Any] | None]:
        """Of each stage what is known of it, None where it is to be computed.

        Files are compared by contents where they are read next: those of the last stage, and of one before a stage to compute.
        """
        found = [self.folder.find(key) for key in keys]
        for i in reversed(range(len(keys))):
            if found[i] is not None and (i + 1 == len(keys) or found[i + 1] is None):
                found[i] = self.folder.find(keys[i], contents=True)
        return found

    def _check_input(self, checkpoint: Stored) -> None:
        """Before the first stage is computed: the input loads cleanly."""
        from compress.models.loading import check_keys

        if not self.checked_input and checkpoint is self.original:
            check_keys(checkpoint)
        self.checked_input = True


def _is_of_state(error: Exception, work: Path) -> bool:
    """Whether an error may come from what a stage's work folder held: none of the user's, but for files there, and no lack."""
    if isinstance(error, CompressError):
        return str(work) in str(error) and not isinstance(error, ResourceError)
    return not is_lack(error)


@contextlib.contextmanager
def _of_pass(planned: PlannedPass) -> Iterator[None]:
    """Errors of a pass say which one it is."""
    try:
        yield
    except PassError as error:
        error.where = error.where or f"passes.{planned.index}.{planned.name}"
        raise


def run(
    recipe: Recipe,
    *,
    fresh: bool = False,
    publish_anyway: bool = False,
    progress: Progress | None = None,
    recipe_path: str | None = None,
) -> RunResult:
    """Run a recipe. See `RunResult`; the report is also written to the run folder.

    Args:
        fresh: compute every stage and measurement anew.
        publish_anyway: publish although a gate failed or was inconclusive (the verdict stays).

    Under torchrun the first process runs the recipe, and the others help; they end here when it is done (SystemExit).

    Raises:
        CompressError: the recipe cannot run here; nothing at the output has changed.
    """
    with process_group(resolve_device(recipe.device)) as processes:
        if processes.rank:
            worker_loop(processes)
            raise SystemExit(0)
        result = _run(recipe, processes, fresh, publish_anyway, progress or SilentProgress(), recipe_path)
        processes.broadcast_object(0, None)
    return result


def _run(
    recipe: Recipe,
    processes: ProcessGroup,
    fresh: bool,
    publish_anyway: bool,
    progress: Progress,
    recipe_path: str | None,
) -> RunResult:
    """The whole run, in the first process."""
    from compress.gates import judge, verdict
    from compress.recipe import resolved

    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    state = Run(recipe, progress, fresh, processes)
    state.prepare()
    with disk_errors(state.folder.path, "cannot be used"), state.folder.locked():
        recover(state.output)
        remove_leftovers(state.output)
        recipe = state.recipe
        wanted = resolved(recipe)
        identity = fingerprint(
            [
                wanted,
                state.fingerprints(),
                state.data.fingerprint("evaluation") if state.data.files("evaluation") else None,
            ]
        )
        if not fresh and (done := published_report(state, identity)) is not None:
            return RunResult(state.output, done, done["status"], done["exit_status"], True, nothing_to_do=True)
        rows = state.stages()
        measurements = Measurements(state.recipe, state.data, state.folder, state.device, progress, fresh)
        measurements.add(state.original, rows)
        original = {
            "checkpoint": recipe.model,
            "size": asdict(size_on_disk(state.original)),
            "evaluation": measurements.original,
            "latency": measurements.original_latency,
        }
        last = rows[-1]
        result = {key: last.get(key) for key in ("size", "evaluation", "latency")}
        noted, idle = _trainings_that_did_not_help(state.plan, rows)
        wanted_gates = recipe.gates.model_dump(exclude_none=True)
        judged = (
            judge(
                wanted_gates,
                original,
                result,
                confidence=recipe.confidence,
                bootstrap=recipe.bootstrap,
                seed=recipe.seed,
            )
            if wanted_gates
            else []
        )
        status, exit_status = verdict(judged) if judged else ("no gates", EXIT_OK)
        if not judged and idle:
            status, exit_status = "inconclusive", EXIT_INCONCLUSIVE
        published = exit_status == EXIT_OK or publish_anyway
        report = {
            "schema": "compress.report/1",
            "versions": versions(),
            "machine": machine(state.device),
            "recipe": {"path": recipe_path, "fingerprint": identity, "resolved": wanted},
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - clock, 3),
            "status": status,
            "exit_status": exit_status,
            "output": str(state.output),
            "published": published,
            "run_folder": str(state.folder.path),
            "data": measurements.data_summary(),
            "original": original,
            "stages": rows,
            "result": result,
            "gates": [g.to_dict() for g in judged],
            "notes": state.notes
            + noted
            + measurements.notes
            + loading_notes(open_headers(last["folder"], trust_remote_code=True)[0]),
        }
        close(state, report, identity)
        stage_folder = Path(last["folder"])
    return RunResult(state.output if published else stage_folder, report, status, exit_status, published)


def _trainings_that_did_not_help(plan: Plan, rows: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """What the report notes of them, and whether the recipe does not allow one of them."""
    notes, idle = [], False
    for stage, row in zip(plan.stages, rows, strict=True):
        for planned, said in zip(stage.passes, row["passes"], strict=True):
            note = unhelped(planned.name, said["details"].get("training", {}))
            if note is not None:
                notes.append(note)
                idle = idle or not planned.settings.allow_noop
    return notes, idle


def check_result(stored: Stored, handed: Checkpoint, max_ram: int | None) -> float:
    """Keys against the stock class, and where both models fit in memory their logits. Seconds it took.

    Raises `CheckpointError`.
    """
    from compress.models.loading import check_keys
    from compress.models.sameness import same_logits
    from compress.models.stock import check_codes

    start = time.perf_counter()
    check_keys(stored)
    check_codes(stored)
    need = 2 * 4 * stored.spec.parameters
    if need < (max_ram if max_ram is not None else available_memory() // 2):
        same_logits(handed, stored)
    return time.perf_counter() - start


def _times(start: float, written: Written, checked: float) -> dict[str, float]:
    verify = written.verify_seconds + checked
    return {
        "apply_and_write": round(time.perf_counter() - start - verify, 3),
        "verify": round(verify, 3),
        "evaluate": 0.0,
    }


def resolve_device(device: str) -> str:
    """``auto`` is the first GPU where there is one. Raises `CompressError` for one that is not here."""
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", device) is None:
        raise CompressError(f"no computation runs on {device!r}", where="device", fix="give auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return device
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    number = device.partition(":")[2] or "0"
    if not number.isdigit() or int(number) >= count:
        here = f"there are cpu and cuda:0 to cuda:{count - 1}" if count else "there is cpu alone, for this torch"
        raise CompressError(f"the device {device} is not here", where="device", fix=here)
    return device


def check_dtype(dtype: str) -> None:
    """Raises `CompressError` for a dtype that nothing is computed in."""
    if dtype not in DTYPES:
        raise CompressError(f"nothing is computed in {dtype!r}", where="dtype", fix=f"give {', '.join(DTYPES)}")


def machine(device: str) -> dict[str, Any]:
    """The machine that figures were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": f"{platform.system()} {platform.machine()}", "cpu": cpu, "cores": cores, "device": device}
