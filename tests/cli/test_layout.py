from __future__ import annotations

import io
import re

import pytest

from compress.cli.tables.layout import Console, Styled, print_laid_out, print_line
from compress.tabular import TextTable

LONG = "model.layers.{0…29}.self_attn.q_proj.weight"
TABLE = TextTable(
    "title",
    [("tensor", "whole"), ("count", "right"), ("change", "whole"), "empty", "what it says"],
    [
        (LONG, "30 ×", "dtype BF16 ▶ F32", "", "a sentence of several words that may be wrapped"),
        ("b", "", "same", "", ""),
    ],
)


def shown(monkeypatch, table, width=None, terminal=False):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.delenv("COLUMNS", raising=False)
    if width:
        monkeypatch.setenv("COLUMNS", str(width))
    print_laid_out(Console(stream), table)
    return stream.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_table_never_breaks_names_or_sentences_within_words(monkeypatch, width):
    text = shown(monkeypatch, TABLE, width)
    assert LONG in text
    assert "dtype BF16 ▶ F32" in text
    assert {"a", "sentence", "wrapped"} <= {*text.split()}
    assert not any(line.endswith(" ") for line in text.split("\n"))


def test_table_in_a_pipe_has_one_line_per_row(monkeypatch):
    lines = shown(monkeypatch, TABLE).strip("\n").split("\n")
    assert len(lines) == 5
    assert lines[3].endswith("a sentence of several words that may be wrapped")


def test_table_fits_the_terminal_where_the_first_column_stands_above(monkeypatch):
    assert max(map(len, shown(monkeypatch, TABLE, 60).split("\n"))) <= 60


def test_table_filled_leaves_out_empty_columns(monkeypatch):
    assert "empty" not in shown(monkeypatch, TABLE.filled())


def test_styles_are_for_terminals_and_obey_no_color(monkeypatch):
    table = TextTable("", [("gate", "whole")], [(Styled("FAIL", "bold red"),)])
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[1;31mFAIL\x1b[0m" in shown(monkeypatch, table, terminal=True)
    assert "\x1b" not in shown(monkeypatch, table)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown(monkeypatch, table, terminal=True)


def test_line_breaks_between_words_in_a_terminal_alone(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setenv("COLUMNS", "20")
    print_line(Console(stream), "one two three four five six")
    assert stream.getvalue() == "one two three four\nfive six\n"


def test_mistakes_are_coloured_where_colours_are_shown(capsys, monkeypatch):
    from compress.cli.guard import fail

    text = "a.yaml:4:36: sparsity: expected, got 50\n    4 |   - {sparsity: 50}\n      |               ^^\n   did you mean `50%`?"
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    fail(text, 2)
    assert capsys.readouterr().err == text + "\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    fail(text, 2)
    coloured = capsys.readouterr().err
    assert coloured.startswith("\x1b[1ma.yaml:4:36:\x1b[0m sparsity")
    assert "              \x1b[1;31m^^\x1b[0m\n" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == text + "\n"
