"""The page of a report: one file, without requests, that shows foreign text and obeys none of it."""

from __future__ import annotations

import copy
import hashlib
import re
from base64 import b64encode
from html.parser import HTMLParser

import pytest

from compress import report as reports
from compress.errors import ReportError
from compress.report import figures
from compress.report.html.heat import LEVELS, heat_maps, heat_rules
from tests.report.test_lengths import side
from tests.report.test_pictures import TRAINING

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'`<!-- \x1b[31m\ud800"
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; every element that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def trained(report, details):
    """The report with details of its first pass."""
    changed = copy.deepcopy(report)
    changed["stages"][0]["passes"][0]["details"] |= details
    return changed


def blocks(count, **more):
    names = [f"self_attn.{m}_proj" for m in "qkvo"] + [f"mlp.{m}_proj" for m in ("gate", "up", "down")]
    return {
        "blocks": [
            {
                "block": b,
                "seconds": 1.0,
                "tensors": {f"model.layers.{b}.{n}.weight": {"error": 0.001 * (b + i + 1), "format": "int4"} for i, n in enumerate(names)},
                **more,
            }
            for b in range(count)
        ]
    }  # fmt: skip


def test_page_shows_every_figure_of_the_report(finished):
    text = reports.render_html(finished.report)
    page = Page(text)
    for row in figures.before_after(finished.report):
        assert all(cell in page.text for cell in (row.name, row.before, row.after, row.change))
    for gate in finished.report["gates"]:
        assert gate["text"] in page.text
    assert figures.verdict_text(finished.report) in page.text
    assert text.count('viewBox="0 0 480 34"') == len(finished.report["gates"])


def test_page_asks_for_nothing_and_runs_only_its_own_script(finished):
    text = reports.render_html(trained(finished.report, {"training": TRAINING}))
    page = Page(text)
    (policy,) = (a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ")
    assert not [a for _, a in page.elements if {"src", "href"} & a.keys() or any(key.startswith("on") for key in a)]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1
    assert f"script-src 'sha256-{digest}'" in policy
    assert "Permission is hereby granted" in scripts[0], "the licence of uPlot goes with it"
    assert not re.search(r"url\(|@import", text)


def test_page_without_lines_has_no_script(finished):
    text = reports.render_html(finished.report)
    assert "<script" not in text
    assert "script-src &#39;none&#39;" in text


def test_page_shows_hostile_names_and_obeys_none(finished):
    report = trained(
        finished.report,
        {"training": TRAINING, "blocks": [{"block": 0, "seconds": 1.0, "tensors": {HOSTILE: {"error": 0.5}}}], HOSTILE: [HOSTILE]},
    )  # fmt: skip
    report["output"] = report["original"]["checkpoint"] = report["run_folder"] = HOSTILE
    report["notes"] = [HOSTILE]
    report["gates"][0] |= {"gate": HOSTILE, "text": HOSTILE}
    report["recipe"]["path"] = HOSTILE
    report["data"]["evaluation"]["files"] = [HOSTILE]
    report["stages"][0]["passes"][0]["name"] = HOSTILE
    for place in ("original", "result"):
        report[place]["evaluation"]["documents"][0]["id"] = HOSTILE
    token = report["result"]["evaluation"]["changed"][0]
    token |= {"context": HOSTILE, "text": HOSTILE, "document": HOSTILE, "before": {**token["before"], "text": HOSTILE}}
    text = reports.render_html(report)
    text.encode()
    page = Page(text)
    assert "img" not in {tag for tag, _ in page.elements}
    assert sum(tag == "script" for tag, _ in page.elements) == 2  # the numbers of the chart, and our own
    assert page.text.count("alert(1)") >= 8
    assert "\x1b" not in text


def test_page_of_a_hundred_blocks_is_small(finished):
    tuning = {"before": 0.1, "after": 0.05, "rate": 1e-3, "steps": 10, "kept": True, "seconds": 1.0}
    losses = [{str(b): 0.01 * b for b in range(100)}]
    curve = [{"step": i, "loss": 3.0 - 0.01 * i, "kl": 1.0} for i in range(200)]
    details = blocks(100, tuning=tuning) | {"loss_without_block": losses, "removed_blocks": [3]}
    report = trained(finished.report, details | {"training": {**TRAINING, "held_out": curve, "losses": curve}})
    sides = [side(1e-8, None), side(1e-9, None, 0.3)]
    for place, of in zip(("original", "result"), sides, strict=True):
        report[place] |= {
            "latency": {**of["latency"], "prompt": 1, "prefill": None, "decode": None, "memory": {"peak": 1}}
        }
    text = reports.render_html(report)
    assert len(text.encode()) <= 300_000
    assert len(re.findall("<figure>", text)) == 2 + 1 + 1 + 2
    assert text.count('<th scope="row">') == 7


def test_heat_map_averages_experts_and_has_a_level_for_each_value():
    rows = {f"model.layers.1.mlp.experts.{e}.up_proj.weight": {"error": float(e)} for e in range(4)}
    details = {"blocks": [{"block": 1, "tensors": {**rows, "model.layers.1.mlp.router.weight": {"error": 9.0}}}]}
    (heat,) = heat_maps("cast", details)
    assert [(role, cells[0].text, cells[0].level) for role, cells in heat.rows] == [
        ("mlp.experts.*.up_proj", "1.50", 0),
        ("mlp.router", "9.00", LEVELS - 1),
    ]
    formats = [{"tensor": f"h.{b}.attn.weight", "format": "int4", "divergence": b / 7} for b in range(2)]
    (heat,) = heat_maps("cast", {"formats": formats})
    assert heat.blocks == ["0", "1"]
    assert not list(heat_maps("cast", {"blocks": [{"block": 0, "tensors": {"a": {"error": float("nan")}}}]}))


def test_text_on_heat_can_be_read():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for dark in (False, True):
        pairs = re.findall(r"background:#(\w{6});color:#(\w{6})", heat_rules(dark=dark))
        assert len(pairs) == LEVELS
        for pair in pairs:
            low, high = sorted(map(luminance, pair))
            assert (high + 0.05) / (low + 0.05) >= 4.5


def test_worst_documents_are_those_whose_loss_grew_most(finished):
    rows = figures.worst_documents(finished.report, 3)
    grown = [float(row[4]) for row in rows]
    assert grown == sorted(grown, reverse=True)
    sides = [finished.report[place]["evaluation"]["documents"] for place in ("original", "result")]
    more = max((y["nll"] - x["nll"]) / x["tokens"] for x, y in zip(*sides, strict=True))
    assert rows[0][4] == f"{more:+.4f}"


@pytest.mark.parametrize(
    ("name", "begins"), [("a.html", "<!doctype html>"), ("a.md", "# "), ("a.svg", "<svg "), ("a.xml", "<?xml ")]
)
def test_report_command_writes_a_report_again(finished, tmp_path, capsys, name, begins):
    from compress.cli.commands.reports import report

    report(finished.report["run_folder"], tmp_path / name)
    assert (tmp_path / name).read_text().startswith(begins)
    assert capsys.readouterr().out == f"wrote {tmp_path / name}\n"


def test_report_command_finds_the_run_beside_an_output(finished):
    from pathlib import Path

    from compress.cli.commands.reports import _report_of

    run = Path(finished.report["run_folder"])
    for path in (run, run / "report.json", Path(finished.report["output"])):
        assert _report_of(path) == run / "report.json"
    assert (run / "report.html").read_text() == reports.render_html(reports.load(run / "report.json"))


@pytest.mark.parametrize(
    ("subject", "output", "message"),
    [
        ("gone", "a.html", "there is no such file or folder"),
        (".", "a.html", "holds no report.json"),
        (
            "2.json",
            "a.html",
            "of the schema compress.report/2, this version reads compress.report/1; run the recipe again",
        ),
        ("2.json", "a.pdf", "a report is not written as `.pdf`; end it with .html, .md, .svg, .xml"),
    ],
)
def test_report_command_refuses_in_one_line(tmp_path, subject, output, message):
    from compress.cli.commands.reports import report

    (tmp_path / "2.json").write_text('{"schema": "compress.report/2"}')
    with pytest.raises(ReportError) as caught:
        report(str(tmp_path / subject), tmp_path / output)
    assert message in str(caught.value)
