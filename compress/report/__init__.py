"""Reports: measured facts of a run as JSON, and what people and CI read of them. Needs no torch.

`document` writes, reads and validates the JSON; `figures` picks out what is shown; the others render.
"""

from __future__ import annotations

from compress.report.card import model_card
from compress.report.document import check_statistics, judged, load, report_schema, save, to_json, validate
from compress.report.junit import render_junit
from compress.report.markdown import append_step_summary, render_markdown
from compress.report.plot import render_pictures

__all__ = [
    "append_step_summary",
    "check_statistics",
    "judged",
    "load",
    "model_card",
    "render_junit",
    "render_markdown",
    "render_pictures",
    "report_schema",
    "save",
    "to_json",
    "validate",
]
