"""The parts of the page, and their text as HTML."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from compress.escape import in_one_line, printable
from compress.formatting import fixed, percent
from compress.report import figures
from compress.report.brief_recipe import brief
from compress.report.details import Section, sections
from compress.report.html.heat import HeatMap, heat_maps, heat_rules, removal_losses
from compress.report.layout import filled
from compress.report.lengths import HEAD, length_cells, length_notes
from compress.report.markdown import notes, planned_rows, waterfall_cells, waterfall_head
from compress.report.pictures.blocks import block_bars
from compress.report.pictures.gates import gate_strip
from compress.report.pictures.lines import Chart, draw, length_charts, losses_chart
from compress.report.pictures.svg import DARK, LIGHT, Picture, inline, rules
from compress.report.pictures.tradeoff import size_and_quality, waterfall

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

#: Documents that are listed, of those whose loss grew most.
_DOCUMENTS = 10
_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True, slots=True)
class Cells:
    """A table; columns in ``right`` are aligned right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture; ``chart``: its numbers, for a chart that can be zoomed."""

    svg: Markup
    chart: Mapping[str, Any] | None = None


def render_html(report: Mapping[str, Any]) -> str:
    """Return the whole report as one page of HTML. Foreign text in it is shown and never obeyed."""
    from compress.recipe import to_yaml

    sides = report["original"], report["result"]
    lines = list(_line_figures(report))
    script = _script() if any(figure.chart for figure in lines) else ""
    return template().render(
        report=report,
        title=f"{report['original']['checkpoint']} ▶ {report['output']}",
        verdict=figures.verdict_text(report),
        tiles=figures.headline_rows(report),
        pictures=[figure_of(p) for p in (size_and_quality(report), waterfall(report)) if p is not None],
        gates=[(gate, _svg(gate_strip(gate))) for gate in report["gates"]],
        before_after=Cells(("", "before", "after", "change"), _before_after(report), right=(1, 2)),
        row_notes=figures.row_notes(report),
        bar_note=figures.BARS,
        passes=Cells(waterfall_head(report), list(waterfall_cells(report)), right=(1, 2, 4, 5, 6, 7)),
        lines=lines,
        lengths=Cells(HEAD, length_cells(*sides), right=(2, 3)),
        length_notes=length_notes(*sides),
        positions=Cells(
            figures.position_head(report["result"]), figures.position_rows(report["result"]), right=(1, 2, 3)
        ),
        bars=list(_bars(report)),
        maps=list(_maps(report)),
        documents=Cells(
            ("document", "tokens", "before", "after", "more"),
            figures.worst_documents(report, _DOCUMENTS),
            right=(1, 2, 3, 4),
        ),
        tokens=(report["result"]["evaluation"] or {}).get("changed") or [],
        details=list(_details(report)),
        planned=Cells(("pass", "planned", "written", ""), list(planned_rows(report)), right=(1, 2)),
        notes=notes(report),
        data=_data(report),
        recipe=to_yaml(brief(report["recipe"]["resolved"])),
        resolved=to_yaml(report["recipe"]["resolved"]),
        style=style(charts=bool(script)),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


@cache
def template(name: str = "template.html") -> Template:
    """A template of this folder. Values that it shows are escaped."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_read)
    )
    environment.finalize = _shown
    environment.filters["inline"] = _inline
    environment.filters["visible"] = lambda text: in_one_line(text).replace(" ", "␣")
    environment.filters.update(percent=percent, fixed=lambda value: fixed(value, 4))
    environment.filters["filled"] = lambda it: Cells(*filled(it.head, it.rows, it.right))
    return environment.get_template(name)


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(*name.split("/")).read_text(encoding="utf-8")


def _shown(value: Any) -> Any:
    """A value of the template: text with control characters spelt out, which is escaped afterwards."""
    return printable(value) if type(value) is str else value


def _inline(text: str) -> Markup:
    """Markdown of one line as HTML: names between backticks are code."""
    from markupsafe import Markup, escape

    parts = _CODE.split(printable(text))
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part) for i, part in enumerate(parts)
    )


def style(*, charts: bool) -> str:
    """CSS of a page, in light and dark; ``charts``: with that of charts that can be zoomed."""
    dark = f"{_variables(DARK)}{rules(DARK, 'svg ')}{heat_rules(dark=True)}"
    pictures = f"{_variables(LIGHT)}{rules(LIGHT, 'svg ')}{heat_rules(dark=False)}"
    return f"{pictures}@media (prefers-color-scheme:dark){{{dark}}}{_read('style.css')}" + (
        _read("vendor/uPlot.min.css") if charts else ""
    )


def _variables(colours: Mapping[str, str]) -> str:
    return f":root{{{''.join(f'--{name}:{colour};' for name, colour in colours.items())}}}"


def _script() -> str:
    licence = f"/*! uPlot\n{_read('vendor/uPlot.LICENSE')}*/"
    return "\n".join([licence, _read("vendor/uPlot.iife.min.js"), _read("charts.js")])


def _svg(picture: Picture | None) -> Markup | None:
    from markupsafe import Markup

    return None if picture is None else Markup(inline(picture))


def figure_of(picture: Picture, chart: Chart | None = None) -> Figure:
    """A picture for a page, and its numbers where it can be zoomed."""
    svg = _svg(picture)
    assert svg is not None
    return Figure(svg, None if chart is None else asdict(chart))


def _line_figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Losses of each training, then cost by length."""
    for row in _rows(report):
        if "training" in row["details"]:
            chart = losses_chart(row["details"]["training"], f"{row['name']}: loss by step")
            if chart.drawable:
                yield figure_of(draw(chart), chart)
    for chart in length_charts(report["original"], report["result"]):
        yield figure_of(draw(chart), chart)


def _rows(report: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from (row for stage in report["stages"] for row in stage["passes"])


def _before_after(report: Mapping[str, Any]) -> list[Sequence[str]]:
    return [(row.name, row.before, row.after, row.change) for row in figures.before_after(report)]


def _bars(report: Mapping[str, Any]) -> Iterator[Figure]:
    for row in _rows(report):
        removed = {str(block) for block in row["details"].get("removed_blocks", ())}
        title = f"divergence without each block; removed: {', '.join(sorted(removed, key=int)) or 'none'}"
        picture = block_bars(title, removal_losses(row["details"]), removed, lambda loss: fixed(loss, 4))
        if picture is not None:
            yield figure_of(picture)


def _maps(report: Mapping[str, Any]) -> Iterator[HeatMap]:
    for row in _rows(report):
        yield from heat_maps(row["name"], row["details"])


def _details(report: Mapping[str, Any]) -> Iterator[tuple[str, list[Section]]]:
    """Name of each pass with details, and its sections."""
    for row in _rows(report):
        if made := sections(row, ""):
            yield row["name"], made


def _data(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Origin of the run and of its result, by name."""
    rows = [("recipe", f"{report['recipe']['path'] or 'made in Python'}, SHA-256 {report['recipe']['fingerprint']}")]
    for name, data in report["data"].items():
        if data is not None:
            rows.append((name, f"{', '.join(data['files'])}, SHA-256 {data['sha256']}"))
    rows += [("content", f"SHA-256 of all decoded tensors {report['stages'][-1]['content']}")]
    return [*rows, ("run folder", report["run_folder"]), ("output", report["output"])]
