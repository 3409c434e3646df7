"""One trial of a sweep: its recipe, its plan before any work, its run in a process of its own, its result."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from compress.checkpoint.open import open_headers
from compress.errors import EXIT_GATE_FAILED, EXIT_INCONCLUSIVE, EXIT_OK, EXIT_RESOURCES, CompressError
from compress.evaluation.tasks import task_of
from compress.files import remove, write_atomically
from compress.pipeline.folder import RunFolder
from compress.pipeline.preflight import planned_gates
from compress.pipeline.shared import SharedWork
from compress.planning import Plan, make_plan, opened_size
from compress.recipe.gates import metric_of
from compress.recipe.resolve import to_yaml
from compress.recipe.space import labels
from compress.settings import as_written
from compress.sweeps.front import dominates
from compress.sweeps.goals import losses, measured, needed_metrics, planned
from compress.sweeps.study import Claim, Outcome, Study, SweepTrial, TrialPart

#: Beginning of a command's last words.
_WORDS = "compress: "


class Runner(Protocol):
    """Runs a recipe and returns the exit status of `compress run`; negative for the number of a signal."""

    def __call__(self, recipe: Path, *, shared: Path, log: Path, folder: Path, lock: int) -> int:
        """Run the recipe in ``folder``, with messages in ``log``. ``lock``: a descriptor to hold until the end."""
        ...


def run_process(recipe: Path, *, shared: Path, log: Path, folder: Path, lock: int) -> int:
    """Run a recipe in a process of its own, which also holds the lock of the trial."""
    command = [sys.executable, "-m", "compress", "run", str(recipe), "--shared", str(shared)]
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=[lock]
        )
        try:
            return process.wait()
        except BaseException:  # interrupted: the run cleans up and keeps its finished stages
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            raise


@dataclass(frozen=True)
class TrialRuns:
    """The trials of a study. ``runner``: runs a recipe."""

    study: Study
    runner: Runner = run_process

    @cached_property
    def headers(self) -> Any:
        """Spec and metadata of the model."""
        recipe = self.study.search.recipe
        with contextlib.chdir(self.study.folder):
            return open_headers(
                recipe.reference,
                trust_remote_code=recipe.trust_remote_code,
                ignore_auto_map=recipe.ignore_auto_map,
                offline=recipe.offline,
            )

    @property
    def original_bytes(self) -> int:
        """Bytes of the original, as its headers say."""
        spec, metadata = self.headers
        return opened_size(spec, self.study.search.recipe.max_shard_size, metadata).bytes

    def output(self, trial: SweepTrial) -> Path:
        """Where the run of a trial puts its result."""
        return self.study.place(trial) / "model"

    # ---- before any work ----

    def plan(self, trial: SweepTrial) -> Plan:
        """The plan of a trial. Raises `CompressError` where its values do not go together."""
        with contextlib.chdir(self.study.folder):
            return make_plan(self.study.search.trial(trial.values), *self.headers)

    def hopeless(self, trial: SweepTrial, plan: Plan, others: Sequence[SweepTrial]) -> Outcome | None:
        """Why a trial need not run: its planned bytes break a gate, or another trial is better whatever it measures."""
        sweep = self.study.search.sweep
        judged = planned_gates(self.study.search.trial(trial.values), plan)
        if failed := [gate for gate in judged if gate.verdict == "fail"]:
            beyond = excess([gate.to_dict() for gate in failed])
            return Outcome("pruned", excess=beyond, message=f"by its plan {failed[0].gate} fails: {failed[0].text}")
        best = losses(planned(plan, sweep), sweep)
        for other in others:
            if other.first.feasible and dominates(losses(other.first.goals, sweep), best):
                return Outcome("pruned", message=f"trial {other.number} is better, whatever this one measures")
        return None

    # ---- the run ----

    def run(self, task: Claim) -> Outcome:
        """Run a part of a trial. A run that fails is an outcome too."""
        trial, own = task.trial, self.study.place(task.trial)
        clock = time.perf_counter()
        recipe = self._write_recipe(trial, task.part)
        status = self.runner(
            recipe, shared=self.study.shared, log=own / "log.txt", folder=self.study.folder, lock=task.lock
        )
        seconds = round(time.perf_counter() - clock, 1)
        report = self._report(trial) if status in (EXIT_OK, EXIT_GATE_FAILED, EXIT_INCONCLUSIVE) else None
        if report is None:
            lack = status == EXIT_RESOURCES or status < 0
            return Outcome("failed", message=_last_words(own / "log.txt", status), seconds=seconds, lack=lack)
        self._drop_last(trial, report)
        name = "report.json" if task.part == "full" else "proxy.json"
        write_atomically(own / name, self._report_path(trial).read_bytes())
        return Outcome(
            "done",
            report["status"],
            excess(report["gates"]),
            measured(report, self.study.search.sweep),
            [{key: gate[key] for key in ("gate", "verdict", "text")} for gate in report["gates"]],
            seconds=seconds,
            reused=sum(stage["reused"] for stage in report["stages"]),
        )

    def _drop_last(self, trial: SweepTrial, report: Mapping[str, Any]) -> None:
        """Remove a trial's last stage from the shared ones, unless it may begin another trial, which has a pass more."""
        search = self.study.search
        switched = [values for values in (trial.values.get(d.name) for d in search.space if d.is_pass) if not values]
        if not switched:
            SharedWork.at(self.study.shared).drop(Path(report["stages"][-1]["folder"]).name)

    def _report_path(self, trial: SweepTrial) -> Path:
        return RunFolder.of(self.output(trial)).report

    def _report(self, trial: SweepTrial) -> dict[str, Any] | None:
        from compress import report as reports

        try:
            return reports.load(self._report_path(trial))
        except CompressError:
            return None

    def mapping(self, trial: SweepTrial, part: TrialPart) -> dict[str, Any]:
        """The recipe of a trial as JSON values; of a first part with a proxy, that with fewer documents and metrics."""
        search = self.study.search
        made = search.mapping(trial.values)
        made["output"] = beside(self.output(trial), self.study.folder)
        given = made.get("evaluate")
        if given is None:
            task = task_of(self.headers[0].structure.class_name)
            given = [entry.name for entry in search.recipe.fitted(task).evaluate or ()]
        entries = {entry if isinstance(entry, str) else next(iter(entry)): entry for entry in given}
        needed = needed_metrics(search.sweep.goals)
        if part == "proxy":
            read = {*needed, *(metric_of(gate) for gate in search.recipe.gates.given())}
            entries = {name: entry for name, entry in entries.items() if name in read}
            self._lessen(made.get("data"), entries)
        made["evaluate"] = [*entries.values(), *(name for name in needed if name not in entries)]
        return made

    def _lessen(self, data: Mapping[str, Any] | None, entries: Mapping[str, Any]) -> None:
        """Change a recipe's evaluation to that of the proxy: fewer documents, also of tasks of lm-eval."""
        proxy = self.study.search.sweep.proxy
        assert proxy is not None
        bounded = [(data["evaluation"], "max_documents")] if data and data.get("evaluation") else []
        bounded += [(entries["lm_eval"]["lm_eval"], "limit")] if "lm_eval" in entries else []
        for settings, key in bounded:
            settings[key] = min(proxy.max_documents, settings.get(key) or proxy.max_documents)

    def _write_recipe(self, trial: SweepTrial, part: TrialPart) -> Path:
        path = self.study.place(trial) / ("recipe.yaml" if part == "full" else "proxy.yaml")
        write_atomically(path, self.text(trial, part).encode())
        return path.absolute()

    def text(self, trial: SweepTrial, part: TrialPart) -> str:
        """The recipe of a trial as YAML, headed by what it is."""
        head = f"# Trial {trial.number} of {self.study.path.name}: {described(self.study, trial.values)}\n"
        return head + to_yaml(self.mapping(trial, part))

    def thin(self, trial: SweepTrial) -> None:
        """Remove the stages of a trial; its checkpoint stays."""
        remove(RunFolder.of(self.output(trial)).stages)

    def forget(self, trial: SweepTrial) -> None:
        """Remove the checkpoints of a trial; its report, recipe and log stay."""
        output = self.output(trial)
        remove(output)
        remove(RunFolder.of(output).path)


def beside(path: Path, folder: Path) -> str:
    """A path as it is named in a folder: relative inside it, else whole."""
    whole = path.absolute()
    return str(whole.relative_to(folder)) if whole.is_relative_to(folder) else str(whole)


def described(study: Study, values: Mapping[str, Any]) -> str:
    """The values of a trial in a line."""
    names = labels(study.search.space)
    return ", ".join(f"{names[name]} {shown(value)}" for name, value in values.items())


def shown(value: Any) -> str:
    """A value for people."""
    return (
        {True: "yes", False: "no"}[value] if isinstance(value, bool) else "none" if value is None else as_written(value)
    )


def excess(gates: list[dict[str, Any]]) -> float:
    """How far failed gates are beyond their bounds, as shares of these, in all."""
    total = 0.0
    for gate in gates:
        if gate["verdict"] == "fail" and isinstance(gate["value"], (int, float)):
            total += min(abs(gate["value"] - gate["bound"]) / (abs(gate["bound"]) or 1.0), 1e6) or 1e-6
    return total


def _last_words(log: Path, status: int) -> str:
    """Why a run failed: the last message of the command, else its status."""
    if status < 0:
        return f"ended by signal {-status}" + ("; often a lack of memory" if status == -9 else "")
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    words = [line.removeprefix(_WORDS) for line in lines if line.startswith(_WORDS)]
    located = [line for line in lines if ": " in line and not line.startswith(" ")]
    return (words or located or [f"exit status {status}"])[-1]
