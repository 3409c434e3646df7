"""Cells of the family matrix, judged by transformers in a process that cannot import this package."""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from benchmarks.families import cells, judge, page, pico, stock, work
from benchmarks.families.classes import Subject, subjects
from tests import processes

ROOT = Path(__file__).resolve().parents[2]
#: Cells, each of another column and another kind of model.
FIXED = (
    ("Phi3ForCausalLM", "heads"),
    ("LlavaForConditionalGeneration", "eval"),
)
SLOW = (
    ("ViTForImageClassification", "mlp"),
    ("WhisperForConditionalGeneration", "magnitude"),
    ("JambaForCausalLM", "sparsegpt"),
    ("Olmo2ForCausalLM", "layers"),
    ("LlamaForCausalLM", "share"),
    ("BertForMaskedLM", "factorize"),
    ("BartForCausalLM", "gptq"),
    ("GptOssForCausalLM", "rtn"),
)
#: Number of cells that the commit draws.
DRAWN = 60


class _Forked(judge.Stock):
    """The stock process, forked from one that has imported transformers."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self._place = place
        self._pipes: tuple[TextIO, TextIO] | None = None

    def start(self) -> tuple[TextIO, TextIO]:
        if self._pipes is None:
            paths = [self._place / "requests", self._place / "answers"]
            for path in paths:
                os.mkfifo(path)
            processes.Process(
                "import os, runpy, sys\n"
                "[os.dup2(os.open(os.devnull, os.O_WRONLY), stream) for stream in (1, 2)]\n"
                "serve = runpy.run_path(sys.argv[1])['serve']\n"
                "serve(open(sys.argv[2]), open(sys.argv[3], 'w'))\n",
                stock.__file__,
                *paths,
                foreign=True,
                folder="/",
            )
            self._pipes = paths[0].open("w"), paths[1].open()
        return self._pipes

    def close(self) -> None:
        for pipe in self._pipes or ():
            pipe.close()
        self._pipes = None


@pytest.fixture(scope="module")
def stock_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[judge.Stock]:
    process = _Forked(tmp_path_factory.mktemp("stock"))
    yield process
    process.close()


def _subject(class_name: str) -> Subject:
    """The class of the model type that it is named after, where several types have it."""
    types = [subject for subject in subjects() if subject.class_name == class_name]
    return min(types, key=lambda subject: len(subject.model_type))


def _verdict(subject: Subject, cell: str, process: judge.Stock) -> tuple[str, str]:
    results = [result for _, result in work.cells_of(subject, [cell], process) if result]
    return results[0]["verdict"], results[0]["reason"]


@pytest.mark.parametrize(
    ("class_name", "cell"),
    [*FIXED, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in SLOW)],
)
def test_a_cell_works(class_name, cell, stock_process):
    assert _verdict(_subject(class_name), cell, stock_process) == ("works", "")


def _marks() -> dict[tuple[str, str, str], str]:
    """(model type, class, cell) ▶ mark, from the page."""
    found = {}
    for line in (ROOT / "docs/families.md").read_text(encoding="utf-8").splitlines():
        row = [word.strip() for word in line.strip("|").split("|")]
        if len(row) == 2 + len(cells.CELLS) and {*row[2:]} <= {*page.MARKS.values(), page.COMPACT, ""}:
            found.update({(row[0], row[1], cell): mark for cell, mark in zip(cells.CELLS, row[2:], strict=True)})
    return found


def _drawn() -> list[tuple[Subject, str]]:
    """Cells that the commit draws."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return random.Random(done.stdout).sample([(s, cell) for s in subjects() for cell in cells.CELLS], DRAWN)


@pytest.mark.slow
def test_drawn_cells_are_as_the_page_has_them(stock_process):
    marks = _marks()
    differ = []
    for subject, cell in _drawn():
        verdict, reason = _verdict(subject, cell, stock_process)
        mark = marks.get((subject.model_type, subject.class_name, cell))
        if verdict == "wrong" or (mark in (page.MARKS["works"], page.COMPACT) and verdict != "works"):
            differ.append((subject.name, cell, verdict, reason))
    assert differ == []


def test_the_page_has_every_class():
    assert {(model_type, class_name) for model_type, class_name, _ in _marks()} == {
        (subject.model_type, subject.class_name) for subject in subjects()
    }


class _Answers(judge.Stock):
    """Answers as transformers would of a checkpoint with other tensors."""

    def __init__(self, **answer: object) -> None:
        super().__init__()
        self._answer = answer

    def ask(self, **request: object) -> dict[str, object]:
        return self._answer


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"keys": {"missing_keys": ["a.weight"]}}, "1 missing keys for transformers, such as a.weight"),
        ({"error": "KeyError: 'x'", "at": "/a/b.py:3"}, r"the stock reload failed: KeyError: 'x' \(b.py:3\)"),
    ],
)
def test_keys_and_errors_of_the_stock_loader_are_wrong(answer, text, tmp_path):
    where = tmp_path / "model"
    subject = pico.Pico(where, where, where, where, None, where, where, where, "LlamaForCausalLM", "input_ids", False)
    with pytest.raises(judge.Wrong, match=text):
        judge.Judge(_Answers(**answer), tmp_path).perplexity(subject, 1.0, 1)


def test_a_cell_that_takes_too_long_is_wrong(monkeypatch):
    monkeypatch.setattr(work, "LIMIT", 0.05)

    def forever() -> None:
        while True:
            with contextlib.suppress(Exception):
                sum(range(100))

    result = work._result(forever)
    assert result["verdict"] == "wrong"
    assert result["reason"] == "took more than 0.05 seconds"


def test_reasons_of_one_shape_are_counted_together():
    assert page.shape("model.layers.3.mlp.up_proj has 96 inputs") == page.shape("model.layers.0.mlp.up has 8 inputs")
    assert not re.search(r"\d", page.shape("12 of 1,024"))


def test_another_tools_results_are_counted_beside_ours():
    known = {Subject("a", "AForCausalLM", (page.CAUSAL,)): "works", Subject("b", "BForMaskedLM", ("masked LM",)): "unread",
             Subject("c", "CForMaskedLM", ("masked LM",)): "absent"}  # fmt: skip
    peers = {subject: {"verdict": verdict, "reason": "why", "versions": "tool 1"} for subject, verdict in known.items()}
    rows = {subject: {"gptq": {"verdict": "works", "reason": "", "code": "x"}} for subject in known}
    lines = page._beside(rows, peers)
    assert "| causal LM | 1 | 100 % | 100 % | 100 % |" in lines
    assert "| all others | 1 | 100 % | 100 % | 0 % |" in lines
