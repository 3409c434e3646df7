"""More processes for a sweep: on this machine, or as jobs of SLURM by submitit. Each is `compress sweep --join`."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from compress.errors import EXIT_GATE_FAILED, EXIT_INCONCLUSIVE, EXIT_OK, CompressError
from compress.progress import Progress
from compress.recipe.nodes import parse
from compress.recipe.problems import Origin, Problem, plain
from compress.sweeps.study import Study
from compress.sweeps.worker import News, unfinished

#: Minutes of a job; submitit's default is 5.
_MINUTES = 24 * 60
#: Seconds between two looks at jobs.
_WAIT = 2.0
_CLUSTERS = ("slurm", "local")
_VERDICTS = (EXIT_OK, EXIT_GATE_FAILED, EXIT_INCONCLUSIVE)


def _command(study: Study) -> list[str]:
    return [sys.executable, "-m", "compress", "sweep", "--join", str(study.path.absolute()), "--quiet", "--json"]


@contextlib.contextmanager
def beside(study: Study, count: int, progress: Progress) -> Iterator[None]:
    """Context in which so many other processes of this machine take part. They end when no trial is left."""
    processes, logs = [], [study.path / f"worker-{number}.log" for number in range(1, count + 1)]
    try:
        for path in logs:
            with path.open("wb") as log:
                process = subprocess.Popen(
                    _command(study), cwd=study.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
                )
            processes.append(process)
        yield
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process, path in zip(processes, logs, strict=False):
            if process.wait() not in _VERDICTS and (words := last_line(path.read_text(errors="replace"))):
                progress.message(f"{path.name}: {words}")


def check_submit(submit: str | None, options: Sequence[str]) -> dict[str, Any]:
    """The options of submitit by name. Raises `CompressError` where it is not installed, or an option cannot be read."""
    if submit is None:
        if options:
            raise CompressError("is an option of `--submit`", where="--submit-option", fix="add `--submit slurm`")
        return {}
    if submit not in _CLUSTERS:
        raise CompressError(f"there is no `{submit}`", where="--submit", fix=f"use {' or '.join(_CLUSTERS)}")
    if find_spec("submitit") is None:
        raise CompressError("needs submitit", where="--submit", fix="pip install 'compress-toolkit[slurm]'")
    given = {}
    for option in options:
        name, equals, text = option.partition("=")
        problems: list[Problem] = []
        node = parse(text, Origin(option), problems)
        if not equals or node is None or problems:
            raise CompressError("expected KEY=VALUE", where=f"--submit-option {option}", fix="as slurm_partition=gpu")
        given[name] = plain(node)
    return given


def run_jobs(study: Study, count: int, cluster: str, options: dict[str, Any], progress: Progress) -> None:
    """Run so many jobs, and tell what they finish. Returns when all have ended; an interruption cancels them.

    Raises:
        CompressError: submitit refuses the options, or cannot reach the cluster.
    """
    import submitit

    executor = submitit.AutoExecutor(folder=study.path / "jobs", cluster=cluster)
    try:
        executor.update_parameters(**{"timeout_min": _MINUTES, **options})
        jobs = [executor.submit(submitit.helpers.CommandFunction(_command(study))) for _ in range(count)]
    except (RuntimeError, NameError, TypeError, ValueError, OSError) as error:
        raise CompressError(f"submitit: {str(error).splitlines()[0]}", where="--submit") from None
    progress.message(f"{count} job{'s' if count > 1 else ''} of {cluster}: {', '.join(job.job_id for job in jobs)}")
    news = News(study, progress)
    try:
        while True:
            ended = all(job.done() for job in jobs)
            news.tell(study.trials())
            if ended:
                break
            time.sleep(_WAIT)
    except BaseException:
        for job in jobs:
            job.cancel()
        raise
    if not unfinished(study, study.trials()):
        return
    if not news.count and (words := last_line(jobs[0].stderr() or "")):
        raise CompressError(f"the jobs ended without a trial: {words}", where=str(study.path / "jobs"))
    progress.message("the jobs have ended before all trials; the same command goes on")


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
