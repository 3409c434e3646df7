"""SVG pictures of a run, as files beside the report and as elements of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.report.figures import losses_file
from compress.report.lengths import length_rows
from compress.report.pictures.lines import draw, length_charts, losses_chart
from compress.report.pictures.svg import stacked, standalone
from compress.report.pictures.tradeoff import main_picture

#: Name of the picture of size, quality and passes, beside the report.
MAIN_FILE = "report.svg"
#: Name of the picture of cost by length, beside the report.
LENGTHS_FILE = "lengths.svg"


def render_main_picture(report: Mapping[str, Any]) -> str:
    """SVG of size against quality and of the waterfall of passes."""
    return standalone(main_picture(report))


def render_pictures(report: Mapping[str, Any]) -> dict[str, str]:
    """SVG pictures of a run by file name: the main one, of every training, and of cost by length where that was measured."""
    pictures = {MAIN_FILE: main_picture(report)}
    sides = report["original"], report["result"]
    if length_rows(*sides) and (charts := length_charts(*sides)):
        pictures[LENGTHS_FILE] = stacked("cost by length of the prompt", map(draw, charts))
    for row in (row for stage in report["stages"] for row in stage["passes"]):
        if "training" in row["details"]:
            chart = losses_chart(row["details"]["training"], f"{row['name']}: loss by step")
            if chart.drawable:
                pictures[losses_file(report, row)] = draw(chart)
    return {name: standalone(picture) for name, picture in pictures.items()}
