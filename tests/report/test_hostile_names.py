"""Names of files, folders and tensors may hold any character: cards, reports and JUnit show them and obey none."""

from __future__ import annotations

import ast
import re
from xml.etree import ElementTree

import pytest

from compress import report as reports
from compress.escape import fence, in_one_line, markdown, printable, printable_json, quoted
from compress.report.card import _split


def card(report, original=None, **changes):
    loading = reports.Loading("LlamaForCausalLM", compact=True)
    given = {"base": reports.Base("o/tiny", True), "loading": loading, "recipe_yaml": "model: tiny\n"}
    return reports.model_card(report, original, **{**given, **changes})


FRONTS = [
    "tags: [{a: b}]", "tags: [[x], 3, null, good]", "[" * 600, "tags: " + "[" * 1500, "a: !!python/object/apply:os.system [ls]", "&a [*a]", "x: &a [*a]", "x: 2020-01-01", "1: 2",
    "[1]: 2", "? {a: b}\n: c", "x: !!binary aGk=", "x: !!set {a, b}", 'x: "\\uD800"', "x: 1e400", "<<: 3", "x: .nan", "tags: 3", "null: null", "x: !!omap [a: 1]", "x: 12:30:45", "\ttab: 1",
    "y" * 200_000, "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]",
]  # fmt: skip


@pytest.mark.parametrize(
    "front", [pytest.param(f, id=f[:20], marks=[pytest.mark.slow] * f.startswith("tags: [[[[")) for f in FRONTS]
)
def test_card_survives_any_front_matter(front, finished):
    text = card(finished.report, f"---\n{front}\nlicense: mit\n---\n# Theirs\n")
    found, body = _split(text)
    assert found["base_model"] == "o/tiny"
    assert "compressed" in found["tags"]
    assert all(isinstance(tag, str) for tag in found["tags"])
    assert "### Theirs" in body
    text.encode()


def test_card_escapes_hostile_names(finished):
    output = 'x/o"); import os; ("\n<script>'
    text = card(
        {**finished.report, "output": output},
        base=reports.Base("<img src=x onerror=y>", False),
        recipe_yaml="a: |\n  ```\n  # not a heading\n",
    )
    code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]
    call = ast.parse(code).body[-1].value
    assert call.args[0].value == output.partition("/")[2]
    assert len(ast.parse(code).body) == 2
    assert "<script>" not in _split(text)[1].replace(code, "")
    assert "`<img src=x onerror=y>`" in text  # a code span shows it
    assert "````yaml\na: |\n  ```\n  # not a heading\n````" in text


def test_report_escapes_hostile_names(finished):
    report = {
        **finished.report,
        "output": "out<img src=x onerror=y>\n# heading",
        "notes": ["a <script>b", "c\n\n# d\x1b[31m"],
    }
    text = reports.render_markdown(report)
    assert "<img" not in text
    assert "<script>" not in text
    assert "\n# heading" not in text
    assert "\n# d" not in text
    assert "- c\\n\\n# d\\x1b[31m" in text


@pytest.mark.parametrize("name", ["\ufffe", "\uffff", "\ud800", "\x00", "a\x1bb", '<&">'])
def test_junit_is_well_formed_with_hostile_names(name, finished):
    gates = [
        {"gate": f"size {name}", "verdict": verdict, "text": f"why {name}"}
        for verdict in ("pass", "fail", "inconclusive")
    ]
    text = reports.render_junit({**finished.report, "gates": gates, "output": f"out{name}"})
    root = ElementTree.fromstring(text.encode())
    assert len(root.findall(".//testcase")) == 3


def test_escapes_make_names_printable():
    assert (
        printable("a\x1b]0;x\x07\u202eb\x9b\ud800\ufffe\n\té ▶ 漢\u3000")
        == "a\\x1b]0;x\\x07\\u202eb\\x9b\\ud800\\ufffe\n\té ▶ 漢\u3000"
    )
    assert in_one_line("a\nb\tc") == "a\\nb\\tc"
    assert printable_json('"\x9b\U000e0001\ud800"') == '"\\u009b\\udb40\\udc01\\ud800"'
    assert markdown("`<b>` <b> 1 < 2 ``a`<i>`` <!-- `") == "`<b>` &lt;b> 1 < 2 ``a`<i>`` &lt;!-- `"
    assert ast.literal_eval(quoted('a"b\\c\n\x1b')) == 'a"b\\c\n\x1b'
    assert fence("a ```` b") == "`````"
