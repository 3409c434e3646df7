"""The command ``sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compress.cli.commands.common import annotated, print_json, progress
from compress.cli.guard import Judged


def sweep(
    path: Path | None,
    sets: Sequence[str],
    *,
    join: Path | None,
    workers: int,
    submit: str | None,
    submit_options: Sequence[str],
    json: bool,
    quiet: bool,
) -> None:
    """``compress sweep``."""
    from compress.cli import tables
    from compress.errors import CompressError
    from compress.sweeps.run import join_sweep, run_sweep

    if (path is None) is (join is None):
        raise CompressError(
            "expected a recipe, or `--join` and the folder of a sweep", fix="`compress sweep -h` has examples"
        )
    if join is not None and (sets or workers > 1 or submit is not None):
        raise CompressError("a sweep is joined as it is", where="--join", fix="leave out the other options")
    with annotated(), progress(quiet) as shown:
        if join is not None:
            document = join_sweep(join, progress=shown)
        else:
            assert path is not None
            document = run_sweep(
                path, sets, workers=workers, submit=submit, submit_options=submit_options, progress=shown
            )
    if json:
        print_json(document)
    else:
        tables.print_sweep(document)
    raise Judged(document["exit_status"])
