"""The commands on checkpoints: inspect, diff, unpack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compress.cli.commands.common import Code, print_json, progress, say


def inspect(checkpoint: str, *, tensors: bool, zeros: bool, code: Code, offline: bool, json: bool) -> None:
    """``compress inspect``."""
    from compress.cli import tables
    from compress.inspection import inspect as inspect_checkpoint

    data = inspect_checkpoint(code.place(checkpoint), zeros=zeros, **code.options(), offline=offline)
    if json:
        print_json(data)
    else:
        tables.print_inspection(data, tensors=tensors)


def architecture(checkpoint: str, *, save: Path | None, code: Code, offline: bool, json: bool) -> None:
    """``compress inspect --architecture``, with ``--save`` also a file with the record."""
    from compress.cli import tables
    from compress.inspection import architecture as architecture_of

    data, text = architecture_of(code.place(checkpoint), **code.options(), offline=offline, text=save is not None)
    if json:
        print_json(data)
    else:
        tables.print_architecture(data)
    if save is not None and text is not None:
        from compress.files import write_atomically

        write_atomically(save, text.encode())
        if not json:
            say(f"wrote {save}")


def diff(paths: Sequence[str], *, values: bool, tensors: bool, code: Code, json: bool) -> None:
    """``compress diff``, of two checkpoints or of runs."""
    from compress.cli import tables
    from compress.errors import CompressError
    from compress.inspection import diff as diff_checkpoints

    if len(paths) < 2:
        raise CompressError("there is nothing to compare it with", where=paths[0], fix="name two checkpoints, or runs")
    if are_runs(paths):
        diff_runs(paths, json=json)
        return
    a, b = paths
    data = diff_checkpoints(code.place(a), code.place(b), values=values, **code.options())
    if json:
        print_json(data)
    else:
        tables.print_diff(data, tensors=tensors)


def diff_runs(paths: Sequence[str], *, json: bool) -> None:
    """``compress diff`` of runs."""
    from compress.cli import tables
    from compress.files import expanded
    from compress.report.comparison import compare_runs

    data = compare_runs([expanded(path) for path in paths])
    if json:
        print_json(data)
    else:
        tables.print_comparison(data)


def are_runs(paths: Sequence[str]) -> bool:
    """Whether `diff` compares runs: there are more than two, or one is a run folder, a trial of a sweep or a report."""
    places = [Path(path) for path in paths]
    return len(paths) > 2 or any((place / "report.json").is_file() or place.suffix == ".json" for place in places)


def unpack(checkpoint: str, output: Path, *, max_shard_size: str, code: Code, quiet: bool) -> None:
    """``compress unpack``."""
    from compress import api
    from compress.checkpoint.open import open_headers
    from compress.checkpoint.running import codes
    from compress.checkpoint.store import needs_code

    with progress(quiet) as shown:
        written = api.unpack(
            code.place(checkpoint), output, max_shard_size=max_shard_size, progress=shown, **code.options()
        )
    spec, _ = open_headers(code.place(checkpoint), **code.options())
    dense = not (needs_code(spec) or codes(spec) or spec.sources)
    say(f"wrote {written}" + (", with the same tensors: they were dense already" if dense else ""))
