"""The end of a run: make the report and the model card, publish the result, put the report in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.running import loading_notes
from compress.checkpoint.sidecars import safe_file
from compress.checkpoint.store import needs_code
from compress.errors import CompressError, ReportError, one_line
from compress.files import expanded, prepare, put, remove, sha256
from compress.pipeline.contents import compare
from compress.pipeline.fingerprint import versions
from compress.pipeline.publish import publish, read_provenance

if TYPE_CHECKING:
    from compress.pipeline.state import Run


def close(state: Run, report: dict[str, Any], identity: str) -> None:
    """Publish the result if the report says so, and put the report into the run folder.

    All files are written under temporary names first, so a full disk is met before anything is replaced. They are renamed once
    the result is in place. A file that cannot be rendered is left out and noted: a finished run never loses its result to it.
    """
    from compress import report as reports

    notes = report["notes"]
    card = _made_or_noted(notes, "README.md", lambda: _card(state, report)) if report["published"] else None
    files = _rendered(report, notes)
    files["report.json"] = (reports.to_json(report) + "\n").encode()
    folder, pending = state.folder.path, dict[Path, Path]()
    try:
        for name, data in files.items():
            pending[folder / name] = prepare(folder / name, data)
        if report["published"]:
            table = _publish(state, report, identity, {} if card is None else {"README.md": card})
        for name in ("report.json", *files):  # the report before what is made of it
            if (temp := pending.pop(folder / name, None)) is not None:
                _try(state, f"{name} could not be put in place", put, temp, folder / name)
    finally:
        for temp in pending.values():
            with contextlib.suppress(OSError):
                remove(temp)
    if report["published"]:
        kept = {"recipe": identity, "report": _digest(folder / "report.json"), "files": table}
        _try(state, "the publication could not be recorded", state.folder.set_published, kept)
        _try(state, "the stage could not be recorded", state.folder.restamp, state.keys[-1])
    _try(state, "the run could not be recorded", lambda: state.folder.set_current(state.keys, done=True))
    with contextlib.suppress(Exception):  # a summary is no reason to lose a finished run
        reports.append_step_summary(report)


def _try(state: Run, what: str, work: Callable[..., Any], *arguments: Any) -> None:
    """Do work that the result does not depend on; an error of the disk becomes a message and leaves the exit status."""
    try:
        work(*arguments)
    except (OSError, CompressError) as error:
        state.progress.message(f"{what}: {one_line(error)}")


def _made_or_noted(notes: list[str], name: str, make: Callable[[], bytes]) -> bytes | None:
    """The contents of a file; None, and a note, where they cannot be made."""
    try:
        return make()
    except Exception as error:
        notes.append(f"{name} could not be made and is left out: {type(error).__name__}: {one_line(error)}")
        return None


def _rendered(report: Mapping[str, Any], notes: list[str]) -> dict[str, bytes]:
    """The renderings of a report for people and CI: contents by file name."""
    from compress import report as reports

    pictures: dict[str, bytes] = {}

    def draw() -> bytes:
        pictures.update({name: text.encode() for name, text in reports.render_pictures(report).items()})
        return b""

    _made_or_noted(notes, "the pictures", draw)
    texts = {
        "junit.xml": _made_or_noted(notes, "junit.xml", lambda: reports.render_junit(report).encode()),
        "report.html": _made_or_noted(notes, "report.html", lambda: reports.render_html(report).encode()),
        "report.md": _made_or_noted(notes, "report.md", lambda: reports.render_markdown(report).encode()),
    }
    return {**pictures, **{name: data for name, data in texts.items() if data is not None}}


def _publish(state: Run, report: Mapping[str, Any], identity: str, more: Mapping[str, bytes]) -> dict[str, Any]:
    """Publish the last stage. Returns the table of the output."""
    stage = Path(report["stages"][-1]["folder"])
    table, changed = publish(stage, state.files, state.output, _provenance(state, report, identity), more)
    if changed is not None:
        state.progress.message(f"the earlier result at {state.output} was changed meanwhile and is kept as {changed}")
    return table


def _digest(path: Path) -> str | None:
    try:
        return sha256(path)
    except OSError:
        return None


def published_report(state: Run, identity: str) -> dict[str, Any] | None:
    """The report of an earlier run of this recipe whose result is at the output, unchanged; None where there is none."""
    from compress import report as reports

    known = state.folder.published()
    provenance = read_provenance(state.output)
    if known.get("recipe") != identity or provenance is None or provenance.get("recipe") != identity:
        return None
    changed, files = compare(state.output, known["files"])
    if changed or known["report"] is None or _digest(state.folder.report) != known["report"]:
        return None
    try:
        report = reports.load(state.folder.report)
    except ReportError:
        return None
    if files != known["files"]:
        _try(
            state,
            "the times of the output's files could not be recorded",
            state.folder.set_published,
            {**known, "files": files},
        )
    for name, data in _rendered(report, []).items():
        if not (path := state.folder.path / name).exists():
            _try(state, f"{name} could not be written", lambda path=path, data=data: put(prepare(path, data), path))
    return report


def _provenance(state: Run, report: Mapping[str, Any], identity: str) -> dict[str, Any]:
    """The contents of ``compress.json``: the origin of a checkpoint. The same recipe gives the same text."""
    rows = report["stages"]
    return {
        "base_model": _base_name(state.recipe.model),
        "passes": [{"name": p["name"], "settings": p["settings"]} for row in rows for p in row["passes"]],
        "recipe": identity,
        "content": rows[-1]["content"],
        "versions": versions(),
    }


def _base_name(model: str) -> str:
    """A hub id as it is; the last name of a local folder."""
    path = expanded(model)
    return path.resolve().name if path.exists() else model


def _last_names(paths: Any) -> Any:
    """A path or paths; absolute ones are cut to their last names."""
    if isinstance(paths, str):
        return Path(paths).name if Path(paths).is_absolute() else paths
    return [_last_names(path) for path in paths]


def _card(state: Run, report: dict[str, Any]) -> bytes:
    """README.md of the result; where the base model's own text cannot be carried over, without it and with a note."""
    from compress import report as reports
    from compress.recipe import to_yaml

    assert state.original.folder is not None
    spec = open_checkpoint(report["stages"][-1]["folder"], trust_remote_code=True).spec
    recipe = {k: v for k, v in report["recipe"]["resolved"].items() if k not in ("model", "output")}
    recipe["data"] = {
        key: {
            **section,
            **{k: _last_names(section[k]) for k in ("files", "images") if k in section},
        }
        for key, section in recipe["data"].items()
    }
    name = _base_name(state.recipe.model)

    def card(original: str | None) -> bytes:
        return reports.model_card(
            report,
            original,
            compact=needs_code(spec),
            loading=loading_notes(spec),
            class_name=spec.structure.class_name,
            base_model=name,
            recipe_yaml=to_yaml({"model": name, "output": state.output.name, **recipe}),
        ).encode()

    made = _made_or_noted(report["notes"], "the base model's README.md", lambda: card(_readme(state.original.folder)))
    return made if made is not None else card(None)


def _readme(folder: Path | None) -> str | None:
    assert folder is not None
    path = safe_file(folder, "README.md")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
