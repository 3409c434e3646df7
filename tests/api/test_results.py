"""The functions of the package, and what a prompt and a notebook show of their results."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest

import compress
from compress import CompressError
from tests.conftest import ROOT

NAMES = [
    "apply",
    "check",
    "diff",
    "evaluate",
    "export",
    "fit",
    "gate",
    "inspect",
    "load",
    "plan",
    "register_attention",
    "run",
    "unpack",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, pico_llama, texts):
    return {
        "model": str(pico_llama),
        "output": str(tmp_path_factory.mktemp("api") / "small"),
        "store": "compact",
        "document_separator": "<|doc|>",
        "passes": [{"prune_unstructured": {"method": "magnitude", "sparsity": 0.6}}],
        "data": {"evaluation": {"files": [str(texts[1])], "window": 32, "max_documents": 3}},
        "gates": {"size": {"max_ratio": 0.9}},
    }


@pytest.fixture(scope="module")
def result(recipe):
    return compress.run(recipe)


@pytest.fixture(scope="module")
def results(recipe, result, pico_llama, texts):
    measured = compress.evaluate(
        result.checkpoint, data=texts[1], document_separator="<|doc|>", window=32, max_documents=3, baseline=pico_llama
    )
    return {
        "run": result,
        "report": result.report,
        "check": compress.check(recipe),
        "plan": compress.plan(recipe),
        "inspect": compress.inspect(pico_llama),
        "diff": compress.diff(pico_llama, result.checkpoint),
        "evaluate": measured,
        "gate": compress.gate(result.report["run_folder"] + "/report.json"),
    }


def test_dir_lists_the_functions():
    assert [name for name in dir(compress) if not name.startswith("_")] == ["CompressError", *NAMES]


def test_import_costs_nothing():
    code = "import sys, compress; dir(compress); print({'torch', 'numpy', 'pydantic', 'compress.api'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_name_what_comes_back(name):
    function = getattr(compress, name)
    text = inspect.getdoc(function)
    assert text
    if inspect.signature(function).return_annotation not in ("None", "PreTrainedModel", "Path"):
        assert "Returns:" in text
        assert "Raises:" in text


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.rows = [], []

    def handle_starttag(self, tag, attrs):
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append(0)
        self.rows[-1:] = [self.rows[-1] + 1] if tag in ("td", "th") else self.rows[-1:]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", ["run", "report", "check", "plan", "inspect", "diff", "evaluate", "gate"])
def test_result_is_one_short_line_and_sound_tables(results, name):
    text = repr(results[name])
    assert "\n" not in text
    assert len(text) <= 300
    html = results[name]._repr_html_()
    parser = Cells()
    parser.feed(html)
    assert not parser.open
    assert all(parser.rows)
    assert (name == "check") == (not parser.rows)
    lines = results[name]._repr_markdown_().splitlines()
    assert sum(line.startswith("|") for line in lines) == len(parser.rows) + html.count("<table>")
    if isinstance(results[name], dict):
        assert json.loads(json.dumps(results[name])).keys() == results[name].keys()


def test_evaluate_gate_and_run_agree(results, recipe, pico_llama):
    measured, report = results["evaluate"], results["report"]
    assert measured["evaluation"]["bits_per_byte"] == report["result"]["evaluation"]["bits_per_byte"]
    gates = {"size": {"max_ratio": 0.1}}
    judged = compress.gate(results["run"].checkpoint, baseline=pico_llama, gates=gates)
    assert (judged.passed, judged.status, judged.exit_status) == (False, "failed", 1)
    assert judged.to_dict() == {**judged.to_dict(), "subject": str(results["run"].checkpoint), "gates": judged.gates}
    assert results["gate"].passed


def test_hostile_names_are_escaped_in_a_notebook(results):
    data = type(results["inspect"])({**results["inspect"], "checkpoint": "<script>\x1b[2J"})
    html = data._repr_html_()
    assert "<script>" not in html
    assert "\x1b" not in html
    assert "\x1b" not in repr(data)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cast", {"weigths": "int8"}, "did you mean `weights`?"),
        ("cast", {"weights": "int9"}, "cast.weights: expected"),
        ("quantize", {}, "did you mean `cast`?"),
        ("cats", {}, "did you mean `cast`?"),
    ],
)
def test_apply_answers_mistakes_in_the_words_of_a_recipe(tmp_path, pico_llama, name, settings, message):
    with pytest.raises(CompressError) as caught:
        compress.apply(name, pico_llama, tmp_path / "out", **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_check_locates_a_mistake_of_a_pass(tmp_path, recipe):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        json.dumps({**recipe, "passes": [{"cast": {"weights": "int4", "method": "rtn", "group_size": 128}}]}, indent=1)
    )
    with pytest.raises(CompressError) as caught:
        compress.check(file)
    assert f"{file}:" in str(caught.value)
    assert "group_size" in str(caught.value)


def test_metric_that_is_none_is_answered_with_the_one_meant(pico_llama):
    with pytest.raises(CompressError) as caught:
        compress.evaluate(pico_llama, metrics=["bpb"])
    assert "did you mean `bits_per_byte`?" in str(caught.value)
