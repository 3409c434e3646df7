"""The page of a report in a real browser: what it shows, what it asks for, and what it obeys."""

from __future__ import annotations

import copy

import pytest

from compress import report as reports
from compress.report.figures import before_after
from tests.browser.chromium import Page
from tests.report.conftest import finished  # noqa: F401
from tests.report.test_html import HOSTILE, blocks, trained
from tests.report.test_lengths import side
from tests.report.test_pictures import TRAINING

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def full(finished):  # noqa: F811
    """A report with everything that a page can show."""
    losses = [{str(b): 0.01 * b for b in range(100)}]
    details = blocks(100) | {"loss_without_block": losses, "removed_blocks": [3], "training": TRAINING}
    report = trained(finished.report, details)
    for place, of in zip(("original", "result"), (side(1e-8, None), side(1e-9, None, 0.3)), strict=True):
        more = {"prompt": 1, "prefill": None, "decode": None, "memory": {"peak": 1}}
        report[place] |= {"latency": {**of["latency"], **more}}
    return report


def written(report, folder):
    (folder / "report.html").write_text(reports.render_html(report))
    return folder / "report.html"


def faults(page):
    """Errors on the console, exceptions and requests beyond the page itself."""
    methods = ("Runtime.exceptionThrown", "Log.entryAdded")
    said = [
        e for e in page.events if e[0] in methods or (e[0] == "Runtime.consoleAPICalled" and e[1]["type"] == "error")
    ]
    requests = [p["request"]["url"] for name, p in page.events if name == "Network.requestWillBeSent"]
    return said + [url for url in requests[1:] if not url.startswith("data:")]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_page_is_readable_and_asks_for_nothing(page, build, full, tmp_path, width, dark):
    page.open(written(full, tmp_path), width=width, dark=dark)
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelectorAll('canvas').length") == 3
    shown = page.evaluate("document.body.innerText")
    for row in before_after(full):
        assert row.after in shown
    page.screenshot(build / f"report-{width}-{'dark' if dark else 'light'}.png")
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.evaluate((build / "axe.min.js").read_text() + ";0")
    violations = page.evaluate("axe.run().then((found) => found.violations)")
    assert [(v["id"], [node["html"][:200] for node in v["nodes"]][:3]) for v in violations] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert faults(page) == []


def test_chart_is_zoomed_by_dragging_and_reset_by_a_double_click(page, full, tmp_path):
    page.open(written(full, tmp_path), width=1400, dark=False)
    page.evaluate("document.querySelector('.u-over').scrollIntoView({block: 'center'})")
    box = page.evaluate(
        "(({x, y, width, height}) => [x, y, width, height])(document.querySelector('.u-over').getBoundingClientRect())"
    )
    y = box[1] + box[3] / 2
    before = page.evaluate("document.querySelector('.uplot canvas').toDataURL()")
    for kind, share in (("mousePressed", 0.2), ("mouseMoved", 0.6), ("mouseReleased", 0.6)):
        page.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=box[0] + share * box[2],
            y=y,
            button="left",
            buttons=1,
            clickCount=1,
        )
    zoomed = page.evaluate(
        "new Promise((done) => requestAnimationFrame(() => done(document.querySelector('.uplot canvas').toDataURL())))"
    )
    assert zoomed != before
    for kind, count in (("mousePressed", 1), ("mouseReleased", 1), ("mousePressed", 2), ("mouseReleased", 2)):
        page.call("Input.dispatchMouseEvent", type=kind, x=box[0] + 9, y=y, button="left", buttons=1, clickCount=count)
    reset = page.evaluate(
        "new Promise((done) => requestAnimationFrame(() => done(document.querySelector('.uplot canvas').toDataURL())))"
    )
    assert reset == before
    assert faults(page) == []


def test_page_works_without_javascript(build, full, tmp_path):
    page = Page(tmp_path / "profile", javascript=False)
    try:
        page.open(written(full, tmp_path), width=1400, dark=False)
        tree = page.call("DOMSnapshot.captureSnapshot", computedStyles=["display"])
        names = [tree["strings"][i] for i in tree["documents"][0]["nodes"]["nodeName"]]
        assert names.count("svg") == len(full["gates"]) + 6
        assert "CANVAS" not in names
        page.screenshot(build / "report-without-javascript.png")
        assert faults(page) == []
    finally:
        page.close()


def test_page_obeys_no_name(page, finished, tmp_path):  # noqa: F811
    report = trained(finished.report, {"training": TRAINING, HOSTILE: [HOSTILE]})
    report = copy.deepcopy(report) | {"output": HOSTILE, "notes": [HOSTILE]}
    report["stages"][0]["passes"][0]["name"] = HOSTILE
    page.call("Page.addScriptToEvaluateOnNewDocument", source="window.alert = () => { window.obeyed = true; };")
    page.open(written(report, tmp_path), width=1400, dark=False)
    assert page.evaluate("window.obeyed === undefined && document.images.length === 0") is True
    assert page.evaluate("document.querySelectorAll('.uplot').length") == 1
    assert faults(page) == []
