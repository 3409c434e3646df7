from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from compress import passes
from compress.cli.app import app
from compress.cli.help import EXAMPLES, GROUPS
from compress.cli.options import METRICS
from compress.cli.plain import narrowed, plain
from compress.evaluation import metrics
from compress.passes.describe import describe_all
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def commands():
    """Name ▶ command, and its options."""
    import typer.main

    group = typer.main.get_command(app)
    return {name: {opt for p in command.params for opt in p.opts} for name, command in group.commands.items()}


def said(capsys, monkeypatch, *arguments, width=80):
    from compress.cli import main

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERMINAL_WIDTH", str(width))
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err


def test_every_command_has_a_group_and_examples(commands):
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(commands)
    assert EXAMPLES.keys() - {""} == commands.keys()


def test_examples_name_commands_and_options_that_exist(commands):
    lines = [line for examples in EXAMPLES.values() for example in examples for line in example.split(" && ")]
    for line in lines:
        words = shlex.split(line.replace("\\\n", ""))
        assert words[0] == "compress"
        assert {word for word in words if word.startswith("-")} <= commands[words[1]], line


@pytest.mark.parametrize("width", [80, 120])
def test_help_has_whole_summaries(capsys, monkeypatch, width):
    status, out, _ = said(capsys, monkeypatch, "--help", width=width)
    assert status == 0
    assert "..." not in out.partition("Recipes:")[2]
    assert max(map(len, out.splitlines())) <= width
    assert "Run a recipe: apply its passes, evaluate the result, judge the gates." in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chek", "r"], "there is no command `chek`; did you mean `check`?"),
        (["quantize"], "there is no command `quantize`; did you mean `run`?"),
        (["xyzzy"], "there is no command `xyzzy`; `compress --help` lists the commands"),
        (["run", "r", "--frsh"], "`run` has no option `--frsh`; did you mean `--fresh`?"),
        (["--verson"], "`compress` has no option `--verson`; did you mean `--version`?"),
        (["diff", "a"], "a: there is nothing to compare it with; name two checkpoints, or runs"),
        (["passes", "quantize"], "no pass is called `quantize`; did you mean `cast`?"),
        (["eval", "m", "--window", "x"], "invalid value for '--window'"),
        (["eval", "m", "--metric", "bpb"], "did you mean `bits_per_byte`?"),
    ],
)
def test_wrong_words_are_answered_with_the_one_meant(capsys, monkeypatch, arguments, message):
    status, out, err = said(capsys, monkeypatch, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert arguments[:2] == ["eval", "m"] or err.count("\n") == 1


def test_metrics_of_the_help_are_those_there_are():
    assert (*metrics.table(), "latency", "memory") == METRICS


def test_summaries_of_passes_are_read_off_their_source():
    keys = ("name", "summary", "needs")
    assert passes.summaries() == [{key: row[key] for key in keys} for row in describe_all()["passes"]]
    code = "from compress import passes; import sys; passes.summaries(); print('compress.passes.base' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "False\n"


@pytest.mark.parametrize("name", ["cast", "distill"])
def test_pass_is_readable_at_80_columns(capsys, monkeypatch, name):
    _, out, _ = said(capsys, monkeypatch, "passes", name)
    settings = [line for line in out.partition("\nsettings\n")[2].splitlines() if line[2:3] != " "]
    names = [line.strip().partition(":")[0] for line in settings if ": " in line]
    assert names[0] not in ("only", "skip", "allow_noop")
    assert names[-1] in ("only", "skip", "allow_noop")
    assert f"- {name}:" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    "words", [["passes"], ["passes", "cast"], ["runs", "recipes"], ["check", "no.yaml"], ["passes", "prune"]]
)
def test_plain_command_lines_print_what_typer_prints(capsys, monkeypatch, words):
    """Without options typer is not used; behind ``--`` it is."""
    assert plain(words) is not None
    assert plain([words[0], "--", *words[1:]]) is None
    assert said(capsys, monkeypatch, *words) == said(capsys, monkeypatch, words[0], "--", *words[1:])


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["passes", "-h"], ["passes", "a", "b"], ["check"], ["runs", ""], ["run"]]
)
def test_other_command_lines_are_left_to_typer(words):
    assert plain(words) is None


def test_the_app_of_a_command_builds_no_other():
    import typer.main

    assert list(typer.main.get_command(narrowed(app, ["diff", "a", "b"])).commands) == ["diff"]
    assert list(typer.main.get_command(narrowed(app, ["eval"])).commands) == ["eval"]
    assert len(typer.main.get_command(narrowed(app, ["dif"])).commands) == len(app.registered_commands)
