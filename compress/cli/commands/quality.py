"""The commands that measure and judge: eval and gate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.cli.commands.common import Code, annotate_gates, load, print_json, progress
from compress.cli.guard import Judged


def evaluate(
    checkpoint: str, *, baseline: str | None, code: Code, offline: bool, json: bool, quiet: bool, **settings: Any
) -> None:
    """``compress eval``. ``settings``: those of `api.evaluate` besides."""
    from compress import api
    from compress.cli import tables

    with progress(quiet) as shown:
        document = api.evaluate(
            code.place(checkpoint),
            baseline=None if baseline is None else code.place(baseline),
            **{**settings, **code.options()},
            offline=offline,
            progress=shown,
        )
    if json:
        print_json(document)
    else:
        tables.print_evaluation(document)


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
    from compress import report as reports
    from compress.cli import tables
    from compress.pipeline.gate import gate as judge

    clock = time.perf_counter()
    with progress(quiet) as shown:
        judgement = judge(
            code.place(subject),
            baseline=None if baseline is None else code.place(baseline),
            recipe=None if recipe is None else load(recipe, []),
            gates=gates,
            confidence=confidence,
            **code.options(),
            offline=offline,
            progress=shown,
        )
    if junit is not None:
        text = reports.render_junit(
            {
                "gates": judgement.gates,
                "status": judgement.status,
                "output": subject,
                "seconds": time.perf_counter() - clock,
                "recipe": {"path": recipe},
            }
        )
        junit.write_text(text, encoding="utf-8")
    if json:
        print_json(judgement.to_dict())
    else:
        tables.print_gates(judgement.gates, judgement.status)
    reports.append_gates_summary(subject, judgement.gates, judgement.status)
    annotate_gates(judgement.gates)
    raise Judged(judgement.exit_status)
