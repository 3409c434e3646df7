"""The report as one page of HTML: it needs no network, works without JavaScript, and has a light and a dark look.

`page` makes the parts from the figures of the report, `heat` the maps of damage, `template.html` places them. Where JavaScript
runs, `charts.js` replaces pictures of lines by charts of uPlot (in ``vendor/``, MIT) with zoom and values under the pointer.
"""

from __future__ import annotations

from compress.report.html.page import render_html

__all__ = ["render_html"]
