"""Reports of runs: as JSON, and rendered for people and CI. Needs no torch.

`schema` defines the JSON, `document` writes, reads and validates it. `figures` selects numbers; the other modules render.
"""

from __future__ import annotations

from compress.report.brief import brief
from compress.report.card import Base, Loading, model_card
from compress.report.document import check_statistics, judged, load, report_schema, save, to_json, validate
from compress.report.html import render_html
from compress.report.junit import render_junit
from compress.report.markdown import append_step_summary, render_markdown
from compress.report.pictures import render_main_picture, render_pictures

__all__ = [
    "Base",
    "Loading",
    "append_step_summary",
    "brief",
    "check_statistics",
    "judged",
    "load",
    "model_card",
    "render_html",
    "render_junit",
    "render_main_picture",
    "render_markdown",
    "render_pictures",
    "report_schema",
    "save",
    "to_json",
    "validate",
]
