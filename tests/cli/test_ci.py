from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from compress.cli import ci
from compress.errors import Mistake
from tests.conftest import ROOT

WRONG = """model: {model}
output: out
passes:
  - cast: {{weigths: int8}}
  - prune_unstructured: {{sparsity: 50}}
"""


@pytest.fixture
def checked(tmp_path, pico_llama, capsys, monkeypatch):
    """Run ``compress check`` in a folder with two wrong recipes and a good one."""
    from compress.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    (tmp_path / "a.yaml").write_text(WRONG.format(model=pico_llama))
    (tmp_path / "b.yaml").write_text("model: ./none\n")
    (tmp_path / "good.yaml").write_text(f"model: {pico_llama}\noutput: out\npasses: [{{cast: {{weights: bf16}}}}]\n")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compress", "check", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return call


def test_check_shows_the_mistakes_of_several_recipes(checked):
    status, out, err = checked("a.yaml", "good.yaml", "b.yaml")
    assert status == 2
    assert out == "good.yaml: no mistakes found\n"
    assert [name in err for name in ("a.yaml:4:12: ", "a.yaml:5:36: ", "b.yaml")] == [True] * 3


def test_check_tells_github_file_line_and_column(checked, monkeypatch):
    plain = checked("a.yaml", "good.yaml")
    status, out, err = checked("a.yaml", "good.yaml", "--format", "github")
    lines = [line for line in out.splitlines() if line.startswith("::")]
    assert (status, err) == (2, plain[2])
    assert lines[0].startswith("::error file=a.yaml,line=4,col=12,endColumn=19::unknown key `weigths`")
    assert lines[1].startswith("::error file=a.yaml,line=5,col=36,endColumn=38::sparsity: ")
    assert "50%25" in lines[1]
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert checked("a.yaml", "good.yaml") == (2, out, err)
    assert checked("a.yaml", "good.yaml", "--format", "text") == plain


def test_check_sarif_is_one_document(checked):
    status, out, _ = checked("a.yaml", "good.yaml", "--format", "sarif")
    (run,) = json.loads(out)["runs"]
    assert status == 2
    places = [result["locations"][0]["physicalLocation"] for result in run["results"]]
    assert [place["artifactLocation"]["uri"] for place in places] == ["a.yaml", "a.yaml"]
    assert places[0]["region"] == {"startLine": 4, "startColumn": 12, "endColumn": 19}
    status, out, err = checked("good.yaml", "--format", "sarif")
    assert (status, json.loads(out)["runs"][0]["results"], err) == (0, [], "")


@pytest.mark.parametrize("arguments", [("--format", "xml"), ("good.yaml", "--json"), ("--format", "sarif", "--json")])
def test_check_refuses_formats_that_do_not_go_together(checked, arguments):
    status, out, err = checked("good.yaml", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_workflow_commands_cannot_be_forged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "a,line=1::x\n::error::y.yaml"
    (tmp_path / name).write_text("")
    (line,) = ci.github([Mistake("wrong\n::error::more\x1b[2J", "100%", name, 3, 1)])
    assert "\n" not in line
    assert "\x1b" not in line
    assert line.count("::") == 2 + line.partition("::")[2].partition("::")[2].count("::")
    assert line.startswith("::error file=a%2Cline=1%3A%3Ax%0A%3A%3Aerror%3A%3Ay.yaml,line=3,")
    assert line.endswith("100%25")


def test_gates_that_did_not_pass_are_told_to_github():
    rows = [{"gate": f"size.{v}", "verdict": v, "text": "5% of 3"} for v in ("pass", "fail", "inconclusive")]
    assert ci.github_gates(rows) == [
        "::error title=gate size.fail::5%25 of 3",
        "::warning title=gate size.inconclusive::5%25 of 3",
    ]


def test_gates_are_appended_to_the_step_summary(tmp_path, monkeypatch):
    from compress import report

    rows = [{"gate": "size.max_ratio", "verdict": "fail", "text": "0.9 not ≤ 0.5 <b>"}]
    assert not report.append_gates_summary("out/model", rows, "failed") or os.environ.get("GITHUB_STEP_SUMMARY")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert report.append_gates_summary("out/model", rows, "failed")
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("# out/model: gates failed\n")
    assert "| `size.max_ratio` | ❌ FAIL | 0.9 not ≤ 0.5 &lt;b> |" in text


@pytest.fixture
def action(tmp_path):
    """Run the step of the action with a command in the place of ``compress`` that prints its arguments."""
    fake = tmp_path / "bin" / "compress"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit ${STATUS:-0}\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    names = ("RECIPE", "SETS", "SUBJECT", "BASELINE", "GATES")

    def call(**variables):
        done = subprocess.run(
            ["bash", ROOT / "tools/action.sh"], capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, **dict.fromkeys(names, ""), "REPORT": "report", "GITHUB_OUTPUT": str(tmp_path / "output"),
                 "PATH": f"{fake.parent}:{os.environ['PATH']}", **variables},
        )  # fmt: skip
        return done.returncode, done.stdout.splitlines(), (tmp_path / "output").read_text().split()

    return call


def test_action_runs_a_recipe_with_overrides(action):
    done = action(COMMAND="run", RECIPE="my recipe.yaml", SETS="output=out/a b\n\n  \nseed=1\n", STATUS="3")
    assert done == (3, ["run", "my recipe.yaml", "--set", "output=out/a b", "--set", "seed=1"], ["status=3"])


def test_action_judges_a_checkpoint(action):
    status, arguments, output = action(COMMAND="gate", SUBJECT="out/m", BASELINE="b.json", GATES="size.max_ratio=60%\n")
    assert (status, output) == (0, ["junit=report/gates.xml", "status=0"])
    assert arguments == [
        "gate", "out/m", "--junit", "report/gates.xml", "--baseline", "b.json", "--gate", "size.max_ratio=60%"
    ]  # fmt: skip


def test_action_checks_several_recipes(action):
    assert action(COMMAND="check", RECIPE="a.yaml b.yaml")[1] == ["check", "a.yaml", "b.yaml"]


def test_action_names_its_inputs_and_the_script_its_variables():
    text = (ROOT / "action.yml").read_text()
    data = YAML(typ="safe").load(text)
    used = set(re.findall(r"inputs\.([a-z-]+)", text))
    assert used == data["inputs"].keys()
    (step,) = [step for step in data["runs"]["steps"] if step.get("id") == "compress"]
    script = (ROOT / "tools/action.sh").read_text()
    assert set(re.findall(r"\$([A-Z]+)\b", script)) == step["env"].keys() - {"NO_COLOR"}
    hook = YAML(typ="safe").load((ROOT / ".pre-commit-hooks.yaml").read_text())[0]
    assert hook["entry"].split() == ["compress", "check"]
