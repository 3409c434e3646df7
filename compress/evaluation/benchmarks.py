"""Tasks of lm-eval: measured in a process of its own, paired document by document, with intervals. Needs no torch."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError, CompressError, ReportError
from compress.evaluation.lm_eval_settings import LmEvalSettings
from compress.evaluation.metrics.base import Resampling
from compress.evaluation.worker import started
from compress.statistics import Interval, accuracy_drop, share

#: Metrics of lm-eval that are a function of a ratio of sums (`lm_eval.api.metrics`).
_OF_SUMS = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def _of_ratio(metric: str, ratio: Any) -> Any:
    """A metric of a ratio of sums, such as log-likelihood over bytes; the ratio itself for other metrics."""
    import numpy as np

    if metric in _OF_SUMS:
        return -ratio / math.log(2) if metric == "bits_per_byte" else np.exp(-ratio)
    return ratio


def check_lm_eval(settings: LmEvalSettings) -> None:
    """Check that there are tasks, that lm-eval is installed, and that files of tasks exist. Raises `CompressError`."""
    if not settings.tasks:
        raise CompressError("names no task", where="evaluate.lm_eval", fix="write `lm_eval: {tasks: [arc_easy]}`")
    for task in settings.tasks:
        if task.endswith(".yaml") and not Path(task).is_file():
            raise CompressError(f"{task}: there is no such file", where="evaluate.lm_eval.tasks")
    if find_spec("lm_eval") is None:
        raise CompressError("needs lm-eval", where="evaluate.lm_eval", fix="pip install 'compress-toolkit[lm-eval]'")


def measure_tasks(
    folder: Path, settings: LmEvalSettings, *, dtype: str, device: str, trust_remote_code: bool, offline: bool
) -> dict[str, Any]:
    """Measure a checkpoint on the tasks.

    Returns:
        JSON values: ``version`` of lm-eval, and ``tasks``: name ▶ ``version``, ``shots``, ``metrics``, ``higher`` (is
        better) and ``rows``, a value of each metric by document.

    Raises:
        CompressError: a task is unknown, its data are not here, or the model cannot be loaded.
    """
    code = {"offline": offline, "trust_remote_code": trust_remote_code}
    command = {"folder": str(folder), "dtype": dtype, "device": device, **code, **settings.model_dump(mode="json")}
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE") if offline else ()
    environment = {**os.environ, **dict.fromkeys(names, "1"), "TOKENIZERS_PARALLELISM": "false"}
    run = [sys.executable, "-m", "compress.evaluation.lm_eval_worker"]
    with started(run, environment, "tasks of lm-eval") as worker:
        worker.send(command)
        try:
            answer = worker.answer(patience=None)  # a task may take hours
        except CheckpointError as error:
            raise CompressError(error.what, where="evaluate.lm_eval") from None
    return answer


def metric_of_task(task: Mapping[str, Any], name: str | None, where: str) -> str:
    """The metric of a task that a gate reads; by default the first. Raises `ReportError` where it has no such metric."""
    known = list(task["metrics"])
    if (chosen := name or next(iter(known), None)) not in known:
        raise ReportError(f"the gate `{where}` needs the metric {chosen}; the task has {', '.join(known) or 'none'}")
    assert chosen is not None
    return chosen


def task_level(task: Mapping[str, Any], metric: str, resampling: Resampling) -> Interval:
    """Value of a metric with its interval: exact for rights and wrongs, else resampled over documents."""
    rows = _columns(task, metric)
    if metric in _OF_SUMS:
        return resampling.sums(lambda sums: _of_ratio(metric, sums[0] / sums[1]), rows)
    if _counts(rows[0]):
        return share(int(sum(rows[0])), len(rows[0]), resampling.confidence)
    return resampling.sums(lambda sums: sums[0] / sums[1], rows)


def task_change(
    before: Mapping[str, Any], after: Mapping[str, Any], metric: str, resampling: Resampling, *, relative: bool = False
) -> Interval:
    """Paired change from ``before`` to ``after``: a drop in points where more is better, else an increase.

    Args:
        relative: the increase as a share of the value before.

    Raises:
        ReportError: the two were measured on other documents.
    """
    if [(r["id"], r["hash"]) for r in before["rows"]] != [(r["id"], r["hash"]) for r in after["rows"]]:
        raise ReportError("a task of lm-eval was measured on other documents")
    first, last = _columns(before, metric), _columns(after, metric)
    if before["higher"][metric]:
        if _counts(first[0]) and _counts(last[0]):
            pairs = list(zip(first[0], last[0], strict=True))
            lost, won = sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
            return accuracy_drop(lost, won, len(pairs), resampling.confidence)
        return resampling.sums(lambda s: 100 * (s[0] - s[1]) / s[2], [first[0], last[0], first[1]])

    def increase(sums: Any) -> Any:
        x, y = _of_ratio(metric, sums[0] / sums[1]), _of_ratio(metric, sums[2] / sums[3])
        return y / x - 1 if relative else y - x

    return resampling.sums(increase, [*first, *last])


def _columns(task: Mapping[str, Any], metric: str) -> list[Any]:
    """Sums and divisors of a metric by document, each [documents]. Raises `ReportError` where there are none."""
    import numpy as np

    values = [row.get(metric) for row in task["rows"]]
    if any(value is None for value in values):
        raise ReportError(f"{metric} has no values by document, so it has no interval")
    pairs = [value if isinstance(value, list) else [value, 1.0] for value in values]
    return list(np.array(pairs, dtype=np.float64).T)


def _counts(values: Sequence[float]) -> bool:
    return all(value in (0.0, 1.0) for value in values)
