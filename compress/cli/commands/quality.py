"""The commands that measure and judge: eval and gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.commands.common import Code, load, print_json, progress
from compress.cli.guard import Judged
from compress.errors import EXIT_INCONCLUSIVE, ReportError

if TYPE_CHECKING:
    from compress.gates import GateResult
    from compress.pipeline.baseline import EvaluationSettings
    from compress.recipe import Recipe


def evaluate(
    checkpoint: str,
    settings: EvaluationSettings,
    *,
    baseline: str | None,
    confidence: float,
    code: Code,
    offline: bool,
    json: bool,
    quiet: bool,
) -> None:
    """``compress eval``."""
    from compress.cli import tables
    from compress.pipeline.evaluate import evaluate as evaluate_checkpoint

    document = evaluate_checkpoint(
        code.place(checkpoint),
        settings,
        baseline=None if baseline is None else code.place(baseline),
        confidence=confidence,
        **code.options(),
        offline=offline,
        progress=progress(quiet),
    )
    if json:
        print_json(document)
    else:
        tables.print_evaluation(document)


@dataclass(frozen=True)
class _Judgement:
    """Results of the gates.

    Attributes:
        settings: confidence, resamples and seed of the intervals.
        report: the report that was judged; None for a checkpoint.
        idle: no gate is given, but a training did not help, so the verdict is inconclusive.
    """

    results: Sequence[GateResult]
    settings: Mapping[str, Any]
    report: Mapping[str, Any] | None = None
    idle: bool = False


def gate(
    subject: str,
    *,
    baseline: str | None,
    recipe: Path | None,
    gates: Sequence[str],
    confidence: float | None,
    junit: Path | None,
    code: Code,
    offline: bool,
    json: bool,
    quiet: bool,
) -> None:
    """``compress gate``."""
    from compress import gates as gating
    from compress import report as reports
    from compress.cli import tables
    from compress.recipe import read_gates
    from compress.recipe import resolved as resolve

    loaded = load(recipe, []) if recipe is not None else None
    wanted = read_gates(resolve(loaded)["gates"] if loaded is not None else {}, gates)
    if Path(subject).is_dir() or Path(subject).suffix != ".json":
        judgement = _of_checkpoint(subject, baseline, wanted, loaded, confidence, code, offline=offline, quiet=quiet)
    else:
        judgement = _of_report(subject, baseline, wanted, confidence)
    status, exit_status = gating.verdict(judgement.results)
    if judgement.idle:
        status, exit_status = "inconclusive", EXIT_INCONCLUSIVE
    rows = [r.to_dict() for r in judgement.results]
    if junit is not None:
        text = reports.render_junit({"gates": rows, "status": status, "output": subject})
        junit.write_text(text, encoding="utf-8")
    if json:
        verdict = {"subject": subject, "status": status, "exit_status": exit_status, "gates": rows}
        print_json({"schema": "compress.verdict/1", **verdict, **judgement.settings})
    else:
        tables.print_gates(rows, status)
    raise Judged(exit_status)


def _of_checkpoint(
    subject: str,
    baseline: str | None,
    wanted: Mapping[str, Any],
    recipe: Recipe | None,
    confidence: float | None,
    code: Code,
    *,
    offline: bool,
    quiet: bool,
) -> _Judgement:
    from compress.pipeline.evaluate import judge_checkpoint

    if baseline is None:
        raise ReportError("a checkpoint is judged against a baseline", fix="give --baseline, or name a report.json")
    if not wanted:
        raise ReportError("there is no gate to judge", fix="give --recipe or --gate")
    results, settings = judge_checkpoint(
        code.place(subject),
        code.place(baseline),
        wanted,
        recipe=recipe,
        confidence=confidence,
        **code.options(),
        offline=offline,
        progress=progress(quiet),
    )
    return _Judgement(results, settings)


def _of_report(subject: str, baseline: str | None, wanted: Mapping[str, Any], confidence: float | None) -> _Judgement:
    from compress import report as reports
    from compress.gates import judge
    from compress.recipe import read_gates

    if baseline is not None:
        raise ReportError("a report holds its own baseline", fix="leave out --baseline")
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
    with reports.judged(subject):
        results = judge(wanted, report["original"], report["result"], **settings)
    return _Judgement(results, settings, report, idle)
