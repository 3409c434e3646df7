"""The commands that list: passes, schema, runs; and clean, which removes what runs left."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path

from compress.cli.commands.common import print_json, say
from compress.errors import CompressError


def passes_(name: str | None, *, json: bool) -> None:
    """``compress passes [NAME]``."""
    from compress import passes
    from compress.cli import tables

    if name is None and not json:
        tables.print_passes(passes.summaries())
        return
    from compress.passes.describe import describe, describe_all

    data = describe_all() if name is None else describe(name)
    if json:
        print_json(data)
    else:
        tables.print_pass(data)


def schema(*, report: bool) -> None:
    """``compress schema``."""
    if report:
        from compress.report import report_schema

        data = report_schema()
    else:
        from compress.recipe import recipe_schema

        data = recipe_schema()
    sys.stdout.write(json_module.dumps(data, indent=2, ensure_ascii=False) + "\n")


def runs(folder: Path, *, json: bool) -> None:
    """``compress runs``."""
    from compress.cli import tables
    from compress.pipeline.housekeeping import list_runs

    if not folder.is_dir():
        raise CompressError("there is no such folder", where=str(folder))
    data = list_runs(folder)
    if json:
        print_json({"schema": "compress.runs/1", "runs": data})
    else:
        tables.print_runs(data)


def clean(run_folder: Path, *, everything: bool, dry_run: bool) -> None:
    """``compress clean``."""
    from compress.formatting import format_bytes
    from compress.pipeline.housekeeping import clean as clean_run

    removed, freed = clean_run(run_folder, everything=everything, dry_run=dry_run)
    verb = "would remove" if dry_run else "removed"
    say(f"{verb} {', '.join(removed) or 'nothing'}; {format_bytes(freed)}")
