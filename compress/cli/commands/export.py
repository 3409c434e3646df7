"""The command ``export``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.cli.commands.common import Code, print_json, progress


def export(
    checkpoint: str,
    to: str,
    output: Path,
    *,
    given: Mapping[str, str | int | None],
    dry_run: bool,
    code: Code,
    offline: bool,
    json: bool,
    quiet: bool,
) -> None:
    """``compress export``. ``given``: options of targets, None for those that were not given."""
    from compress import api
    from compress.cli import tables

    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with progress(quiet or json) as shown:
        plan = api.export(
            code.place(checkpoint),
            output,
            to=to,
            dry_run=dry_run,
            offline=offline,
            progress=shown,
            **{**code.options(), **settings},
        )
    if json:
        print_json({"checkpoint": checkpoint, "output": str(output), "written": not dry_run, **plan})
    else:
        tables.print_export(checkpoint, output, plan, written=not dry_run)
