"""Reports of runs: as JSON, and rendered for people and CI. Needs no torch.

`schema` defines the JSON, `document` reads and validates it. `figures` selects numbers; the other modules render.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.report.brief_recipe import brief as brief
    from compress.report.card import Base as Base
    from compress.report.card import Loading as Loading
    from compress.report.card import model_card as model_card
    from compress.report.document import check_statistics as check_statistics
    from compress.report.document import judged as judged
    from compress.report.document import load as load
    from compress.report.document import report_schema as report_schema
    from compress.report.document import validate as validate
    from compress.report.html import render_html as render_html
    from compress.report.json_text import save as save
    from compress.report.json_text import to_json as to_json
    from compress.report.junit import render_junit as render_junit
    from compress.report.markdown import append_gates_summary as append_gates_summary
    from compress.report.markdown import append_step_summary as append_step_summary
    from compress.report.markdown import render_markdown as render_markdown
    from compress.report.pictures import render_main_picture as render_main_picture
    from compress.report.pictures import render_pictures as render_pictures

_HOME = {
    "Base": "card",
    "Loading": "card",
    "append_gates_summary": "markdown",
    "append_step_summary": "markdown",
    "brief": "brief_recipe",
    "check_statistics": "document",
    "judged": "document",
    "load": "document",
    "model_card": "card",
    "render_html": "html",
    "render_junit": "junit",
    "render_main_picture": "pictures",
    "render_markdown": "markdown",
    "render_pictures": "pictures",
    "report_schema": "document",
    "save": "json_text",
    "to_json": "json_text",
    "validate": "document",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import what is asked for and no more."""
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
