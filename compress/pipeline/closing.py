"""The end of a run: make the report and the model card, publish the result, put the report in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, ReportError, one_line
from compress.files import prepare, put, remove, sha256
from compress.pipeline.card import base_name, card_of
from compress.pipeline.contents import compare
from compress.pipeline.fingerprint import versions
from compress.pipeline.imatrix import NAME as IMATRIX
from compress.pipeline.imatrix import imatrix_of
from compress.pipeline.publish import publish, read_provenance

if TYPE_CHECKING:
    from compress.pipeline.state import Run

#: File name of the main picture beside the card.
CARD_PICTURE = "compression.svg"


def close(state: Run, report: dict[str, Any], identity: str) -> None:
    """Publish the result if the report says so, and put the report into the run folder.

    All files are written under temporary names first, so a full disk is met before anything is replaced. They are renamed once
    the result is in place. A file that cannot be rendered is left out and noted: a finished run never loses its result to it.
    """
    from compress import report as reports

    notes = report["notes"]
    beside = _beside(state, report) if report["published"] else {}
    files = _rendered(report, notes)
    imatrix = _made_or_noted(notes, IMATRIX, lambda: imatrix_of(state))
    files |= {} if imatrix is None else {IMATRIX: imatrix}
    files["report.json"] = (reports.to_json(report) + "\n").encode()
    folder, pending = state.folder.path, dict[Path, Path]()
    try:
        for name, data in files.items():
            pending[folder / name] = prepare(folder / name, data)
        if report["published"]:
            table = _publish(state, report, identity, beside)
        if imatrix is None:
            _try(state, f"{IMATRIX} of an earlier run could not be removed", remove, folder / IMATRIX)
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


def _made_or_noted(notes: list[str], name: str, make: Callable[[], bytes | None]) -> bytes | None:
    """The contents of a file; None where there is none, and also a note where they cannot be made."""
    try:
        return make()
    except Exception as error:
        notes.append(f"{name} could not be made and is left out: {type(error).__name__}: {one_line(error)}")
        return None


def _beside(state: Run, report: dict[str, Any]) -> dict[str, bytes]:
    """The card of the output and its picture: contents by file name."""
    from compress import report as reports

    notes = report["notes"]
    picture = _made_or_noted(notes, CARD_PICTURE, lambda: reports.render_main_picture(report).encode())
    shown = None if picture is None else CARD_PICTURE

    def card(*, original: bool) -> bytes:
        return card_of(state, report, shown, original=original).encode()

    def made() -> bytes:
        text = _made_or_noted(notes, "the base model's README.md", lambda: card(original=True))
        return text if text is not None else card(original=False)

    files = {CARD_PICTURE: picture, "README.md": _made_or_noted(notes, "README.md", made)}
    return {name: data for name, data in files.items() if data is not None}


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
        "base_model": base_name(state.recipe.model),
        "passes": [{"name": p["name"], "settings": p["settings"]} for row in rows for p in row["passes"]],
        "recipe": identity,
        "content": rows[-1]["content"],
        "versions": versions(),
    }
