"""Gates outside a run: judge the report of a run, or a checkpoint against a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import gates as gating
from compress import report as reports
from compress.errors import EXIT_INCONCLUSIVE, EXIT_OK, ReportError
from compress.pipeline.evaluate import judge_checkpoint
from compress.progress import Progress, SilentProgress
from compress.recipe import read_gates
from compress.recipe import resolved as resolve
from compress.tabular import Shown, TextTable

if TYPE_CHECKING:
    from compress.gates import GateResult
    from compress.recipe import Recipe


@dataclass(frozen=True, repr=False)
class Judgement(Shown):
    """Results of gates.

    Attributes:
        subject: the report or checkpoint that was judged.
        status: ``passed``, ``failed`` or ``inconclusive``. exit_status: of the command line.
        gates: a dictionary per gate: ``gate``, ``verdict``, ``value``, ``bound``, ``lower``, ``upper``, ``unit``,
            ``documents_needed``, ``text``.
        settings: confidence, resamples and seed of the intervals.
    """

    subject: str
    status: str
    exit_status: int
    gates: list[dict[str, Any]]
    settings: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return self.exit_status == EXIT_OK

    def to_dict(self) -> dict[str, Any]:
        """JSON values, schema ``compress.verdict/1``."""
        verdict = {"status": self.status, "exit_status": self.exit_status, "gates": self.gates}
        return {"schema": "compress.verdict/1", "subject": self.subject, **verdict, **self.settings}

    def headline(self) -> str:
        """The status, and the gates that did not pass."""
        others = [f"{row['gate']} {row['text']}" for row in self.gates if row["verdict"] != "pass"]
        return "; ".join([f"{self.subject}: {self.status}", *others])

    def tables(self) -> list[TextTable]:
        """A row per gate."""
        rows = [(row["gate"], row["verdict"], row["text"]) for row in self.gates]
        return [TextTable("", ["gate", "verdict", ""], rows)]


def gate(
    subject: str | Path,
    *,
    baseline: str | Path | None = None,
    recipe: Recipe | None = None,
    gates: Mapping[str, Any] | Sequence[str] = (),
    confidence: float | None = None,
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> Judgement:
    """Judge a report, or a checkpoint against a baseline.

    Args:
        subject: the report.json of a run, or a checkpoint. baseline: for a checkpoint, another one or a stored evaluation.
        recipe: names gates, data and settings of the evaluation. gates: further ones, or replacements: a mapping as in a
            recipe, or texts such as ``bits_per_byte.max_increase=3%``.

    Raises:
        RecipeError: a gate is not one. ReportError: there is no gate to judge, or a value that one needs was not measured.
    """
    sets = () if isinstance(gates, Mapping) else gates
    known = resolve(recipe)["gates"] if recipe is not None else {}
    wanted = read_gates({**known, **gates} if isinstance(gates, Mapping) else known, sets)
    if Path(subject).is_dir() or Path(subject).suffix != ".json":
        if baseline is None:
            raise ReportError("a checkpoint is judged against a baseline", fix="give --baseline, or name a report.json")
        if not wanted:
            raise ReportError("there is no gate to judge", fix="give --recipe or --gate")
        results, settings = judge_checkpoint(
            subject,
            baseline,
            wanted,
            recipe=recipe,
            confidence=confidence,
            trust_remote_code=trust_remote_code,
            ignore_auto_map=ignore_auto_map,
            offline=offline,
            progress=progress or SilentProgress(),
        )
        return _judgement(subject, results, settings)
    if baseline is not None:
        raise ReportError("a report holds its own baseline", fix="leave out --baseline")
    return _of_report(str(subject), wanted, confidence)


def _judgement(subject: str | Path, results: Sequence[GateResult], settings: Mapping[str, Any]) -> Judgement:
    status, exit_status = gating.verdict(results)
    return Judgement(str(subject), status, exit_status, [result.to_dict() for result in results], settings)


def _of_report(subject: str, wanted: Mapping[str, Any], confidence: float | None) -> Judgement:
    """Judge a report; without gates of the caller's by its own. If it has none, and a training did not help: inconclusive."""
    report = reports.load(Path(subject))
    resolved = report["recipe"]["resolved"]
    wanted = wanted or read_gates(resolved.get("gates") or {})
    idle = not wanted and report["status"] == "inconclusive"
    if not wanted and not idle:
        raise ReportError(
            "neither the report nor the command line has a gate", where=subject, fix="give --recipe or --gate"
        )
    settings = {
        "confidence": confidence if confidence is not None else resolved.get("confidence", 0.95),
        "bootstrap": resolved.get("bootstrap", 10000),
        "seed": resolved.get("seed", 0),
    }
    reports.check_statistics(subject, settings)
    if idle:
        return Judgement(subject, "inconclusive", EXIT_INCONCLUSIVE, [], settings)
    with reports.judged(subject):
        return _judgement(subject, gating.judge(wanted, report["original"], report["result"], **settings), settings)
