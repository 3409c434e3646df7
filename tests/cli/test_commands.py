"""Every command as a user gives it: what it prints, and its exit status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from compress import passes
from compress.cli import main
from compress.models.loading import load_model
from tests import processes
from tests.conftest import ROOT


class Done:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run a command in this process, where torch is loaded already."""

    def call(*arguments, width=100):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        code = caught.value.code
        return Done(0 if code is None else code, captured.out, captured.err)

    return call


BASE = {
    "store": "compact",
    "document_separator": "<|doc|>",
    "passes": [
        {"prune_structured": {"layers": 1, "compensation": "none"}},
        {"prune_unstructured": {"method": "magnitude", "sparsity": 0.6}},
    ],
    "evaluate": ["bits_per_byte", "kl", "agreement"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, pico_llama, texts):
    """A folder with a model, a recipe and a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    train, valid = texts
    shutil.copytree(pico_llama, folder / "model")
    data = {
        "calibration": {"files": [str(train)], "samples": 4, "length": 32},
        "evaluation": {"files": [str(valid)], "window": 32, "max_documents": 30},
    }
    recipe = {
        **BASE,
        "model": str(folder / "model"),
        "output": str(folder / "small"),
        "data": data,
        "gates": {"size": {"max_ratio": 0.9}},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    code = f"import sys; sys.argv = ['compress', 'run', {str(folder / 'recipe.yaml')!r}, '--json', '--quiet']; from compress.cli import main; main()"
    done = processes.run(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (folder / "stdout.json").write_text(done.stdout)
    return folder


def test_run_json_is_one_document_of_the_schema(place):
    data = json.loads((place / "stdout.json").read_text())
    jsonschema.validate(data, json.loads((ROOT / "docs/report.schema.json").read_text()))
    assert data == json.loads((place / "small.run/report.json").read_text())
    assert data["status"] == "passed"
    load_model(place / "small")


def test_run_again_has_nothing_to_do(cli, place):
    done = cli("run", place / "recipe.yaml")
    assert done.status == 0
    assert done.out.startswith("nothing to do: ")
    assert "gates: passed" in done.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "status", "word"),
    [
        ("gates.size.max_ratio=0.1", 1, "failed"),
        ("gates.bits_per_byte.max_increase=ABOUT", 3, "inconclusive"),
    ],
)
def test_run_that_does_not_pass_its_gates_is_not_published(cli, place, tmp_path, gate, status, word):
    report = json.loads((place / "stdout.json").read_text())
    before, after = (report[side]["evaluation"]["bits_per_byte"] for side in ("original", "result"))
    sets = [
        "--set",
        gate.replace("ABOUT", repr(after / before - 1 + 1e-5) if after > before else "-0.00001"),
        "--set",
        f"output={tmp_path / 'out'}",
    ]
    if word == "inconclusive":
        sets[1] = f"gates.bits_per_byte.max_increase={after - before!r}"
    done = cli("run", place / "recipe.yaml", *sets, "--quiet")
    assert done.status == status, done.out + done.err
    assert f"gates: {word}" in done.out
    assert "not published; the result is in" in done.out
    assert not (tmp_path / "out").exists()
    anyway = cli("run", place / "recipe.yaml", *sets, "--quiet", "--publish-anyway")
    assert anyway.status == status
    load_model(tmp_path / "out")


def test_check_passes_a_good_recipe(cli, place):
    done = cli("check", place / "recipe.yaml")
    assert (done.status, done.err) == (0, "")
    assert done.out == f"{place / 'recipe.yaml'}: no mistakes found\n"
    resolved = cli("check", place / "recipe.yaml", "--resolved")
    (place / "resolved.yaml").write_text(resolved.out)
    again = cli("check", place / "resolved.yaml", "--resolved")
    assert again.out == resolved.out
    assert cli("check", place / "recipe.yaml", "--json").json["recipe"]["max_shard_size"] == 5 * 10**9


def test_check_reports_every_mistake_at_its_place(cli, tmp_path):
    (tmp_path / "r.yaml").write_text("modle: m\noutput: o\npasses:\n  - cast: {weigths: fp16}\n  - quantise: {}\n")
    done = cli("check", tmp_path / "r.yaml")
    assert done.status == 2
    assert done.out == ""
    for part in (
        "r.yaml:1:1: unknown key `modle`",
        "did you mean `model`",
        "r.yaml:4:12: unknown key `weigths`",
        "r.yaml:5:5: unknown pass `quantise`",
        "4 |   - cast: {weigths: fp16}",
    ):
        assert part in done.err
    assert "Traceback" not in done.err


def test_check_locates_a_pass_that_cannot_apply(cli, place):
    path = place / "nine.yaml"
    path.write_text(
        f"model: {place / 'model'}\noutput: {place / 'nine'}\npasses:\n  - prune_structured:\n      layers: [9]\n      compensation: none\n"
    )
    for command in ("check", "plan", "run"):
        done = cli(command, path)
        assert done.status == 2
        assert f"{path}:5:15: " in done.err, done.err
        assert "    5 |       layers: [9]" in done.err


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("latency: {lengths: [16, 9999]}", "a prompt of 9999 tokens is beyond the model's"),
        ("repetition: {distances: [9999]}", "a passage of "),
    ],
)
def test_check_locates_lengths_beyond_the_model(cli, place, entry, text):
    path = place / "far.yaml"
    words = place / "words.txt"
    words.write_text("words " * 400)
    path.write_text(
        f"model: {place / 'model'}\noutput: {place / 'far'}\ndata: {{evaluation: {{files: [{words}], window: 32}}}}\n"
        f"passes: [{{cast: {{weights: fp16}}}}]\nevaluate:\n  - {entry}\n"
    )
    done = cli("check", path)
    assert done.status == 2
    assert f"{path}:6:" in done.err, done.err
    assert text in done.err


@pytest.mark.parametrize("width", [80, 120])
def test_plan_tables_fit_the_terminal(cli, place, width, monkeypatch):
    monkeypatch.chdir(place)
    for command in (
        ["run", "recipe.yaml", "--quiet", "--set", "model=model", "--set", "output=relative"],
        ["plan", "recipe.yaml"],
        ["inspect", "small"],
        ["inspect", "model", "--tensors"],
        ["diff", "model", "small"],
        ["passes"],
        ["passes", "prune_unstructured"],
        ["runs"],
        ["gate", "relative.run/report.json"],
    ):
        done = cli(*command, width=width)
        assert done.status == 0, done.err
        assert max(len(line) for line in done.out.splitlines()) <= width, done.out
        assert "\x1b" not in done.out


def test_plan_says_what_the_run_wrote(cli, place):
    planned = cli("plan", place / "recipe.yaml", "--json").json
    report = json.loads((place / "stdout.json").read_text())
    assert [s["passes"][0]["planned"]["bytes"] for s in planned["stages"]] == [
        s["size"]["bytes"] for s in report["stages"]
    ]
    assert planned["disk"] == sum(s["size"]["bytes"] for s in report["stages"])
    table = cli("plan", place / "recipe.yaml").out
    assert "as stock" in table
    assert "free" in table


def test_inspect_describes_a_checkpoint(cli, place):
    data = cli("inspect", place / "small", "--json").json
    assert data["size"]["bytes"] == sum(p.stat().st_size for p in (place / "small").glob("*.safetensors"))
    assert data["compact"]
    assert "mask ∘ dense" in cli("inspect", place / "small").out
    zeros = cli("inspect", place / "small", "--zeros", "--json").json
    row = next(t for t in zeros["tensors"] if "up_proj" in t["name"])
    assert row["zeros"] == pytest.approx(row["sparsity"])


def test_diff_compares_two_checkpoints(cli, place):
    assert cli("diff", place / "model", place / "model").out.endswith("no difference\n")
    data = cli("diff", place / "model", place / "small", "--json").json
    assert not data["same"]
    assert "num_hidden_layers" in data["config"]
    assert "removed" in cli("diff", place / "model", place / "small").out


def test_eval_and_gate_against_a_stored_baseline(cli, place, texts, tmp_path):
    _, valid = texts
    text = ["--data", valid, "--separator", "<|doc|>", "--window", "32", "--max-documents", "30", "--quiet"]
    baseline = cli("eval", place / "model", *text, "--json")
    assert baseline.status == 0, baseline.err
    (tmp_path / "baseline.json").write_text(baseline.out)
    report = json.loads((place / "stdout.json").read_text())
    assert baseline.json["evaluation"]["bits_per_byte"] == pytest.approx(
        report["original"]["evaluation"]["bits_per_byte"], rel=1e-9
    )
    paired = cli("eval", place / "small", "--baseline", tmp_path / "baseline.json", "--quiet", "--json").json
    assert paired["paired"]["units"] == 30
    assert paired["evaluation"]["bits_per_byte"] == pytest.approx(
        report["result"]["evaluation"]["bits_per_byte"], rel=1e-9
    )
    shown = cli("eval", place / "small", "--baseline", tmp_path / "baseline.json", "--quiet")
    assert "bits per byte" in shown.out
    assert "30 documents" in shown.out
    p = paired["paired"]["bits_per_byte"]
    for bound, status in ((p["upper"] + 0.001, 0), (p["lower"] - 0.001, 1), (p["increase"], 3)):
        gate = f"bits_per_byte.max_increase={100 * bound:.6f}%"
        done = cli("gate", place / "small", "--baseline", tmp_path / "baseline.json", "--gate", gate, "--quiet")
        assert done.status == status, done.out + done.err
    other = cli(
        "eval",
        place / "small",
        "--baseline",
        place / "model",
        *text,
        "--metric",
        "kl",
        "--metric",
        "agreement",
        "--json",
    ).json
    assert other["evaluation"]["kl"] == pytest.approx(report["result"]["evaluation"]["kl"], rel=1e-6)


def test_gate_judges_a_report(cli, place, tmp_path):
    path = place / "small.run/report.json"
    done = cli("gate", path, "--junit", tmp_path / "junit.xml")
    assert done.status == 0
    assert "size.max_ratio" in done.out
    assert "<testcase" in (tmp_path / "junit.xml").read_text()
    failed = cli("gate", path, "--gate", "size.max_ratio=10%", "--json")
    assert failed.status == 1
    assert failed.json["status"] == "failed"
    assert cli("gate", path, "--gate", "kl.max=1000", "--gate", "agreement.min=0").status == 0
    assert cli("gate", path, "--recipe", place / "recipe.yaml").status == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gate", "gone.json"], "gone.json: there is no such file"),
        (["gate", "recipe.yaml"], "a checkpoint is judged against a baseline; give --baseline, or name a report.json"),
        (["gate", "model"], "a checkpoint is judged against a baseline"),
        (["gate", "model", "--baseline", "model"], "there is no gate to judge; give --recipe or --gate"),
        (["gate", "small.run/report.json", "--gate", "siez.max=1MB"], "did you mean `size`?"),
        (
            ["gate", "small.run/report.json", "--gate", "decode.max_ratio=1"],
            "the gate `decode.max_ratio` needs latency, which was not measured",
        ),
        (["gate", "small.run/report.json", "--baseline", "model"], "a report holds its own baseline"),
        (["eval", "model", "--metric", "bits_per_byte"], "text metrics need text; give --data"),
        (["eval", "model", "--metric", "bleu"], "--metric bleu: expected bits_per_byte, "),
        (["eval", "model", "--metric", "latency"], "`latency` compares with another checkpoint; give --baseline"),
        (["eval", "model", "--baseline", "recipe.yaml"], "recipe.yaml: is not a baseline"),
        (["eval", "model", "--data", "recipe.yaml", "--dtype", "half"], "use float32, bfloat16, float16"),
        (["eval", "model", "--data", "recipe.yaml", "--device", "meta"], "use auto, cpu, cuda or cuda:N"),
        (
            ["eval", "model", "--data", "recipe.yaml", "--window", "16", "--stride", "32"],
            "a stride of 32 would skip text",
        ),
        (["eval", "model", "--data", "/dev/zero"], "/dev/zero: is not a file of text"),
        (["inspect", "gone"], "gone"),
        (["inspect", "model\n"], "model\\n"),
        (["inspect", "org/a--b"], "org/a--b"),
        (["inspect", "a..b"], "a..b"),
        (["inspect", "a" * 97], "a" * 97),
        (["inspect", "."], "config.json"),
        (["diff", "model", "gone"], "gone"),
        (["passes", "casst"], "no pass is called `casst`; did you mean `cast`?"),
        (["unpack", "small", "model"], "model: exists already"),
        (["unpack", "small", "new", "--max-shard-size", "many"], "expected a size such as 500MB"),
        (["unpack", "small", "new", "--max-shard-size", "9" * 400], "expected a size such as 500MB"),
        (["runs", "gone"], "gone: there is no such folder"),
        (["clean", "model"], "is not a run folder"),
        (["run", "gone.yaml"], "there is no such file"),
        (["run"], "missing argument"),
        (["run", "recipe.yaml", "--frsh"], "`run` has no option `--frsh`; did you mean `--fresh`?"),
        (["rnu"], "there is no command `rnu`; did you mean `run`?"),
    ],
)
def test_commands_tell_errors_in_one_line(cli, place, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    done = cli(*arguments)
    assert done.status == 2, done.out + done.err
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_passes_and_schema_are_printed(cli):
    listed = cli("passes", "--json").json["passes"]
    assert [p["name"] for p in listed] == sorted(passes.names())
    shown = cli("passes", "prune_unstructured").out
    for setting in ("sparsity", "pattern", "scope", "only", "skip", "allow_noop"):
        assert setting in shown
    assert "N:M: Mishra" in " ".join(shown.split())  # no emoji for `:M:`
    schema = cli("schema").json
    assert schema == json.loads((ROOT / "compress/recipe/recipe.schema.json").read_text())
    assert cli("schema", "--report").json == json.loads((ROOT / "docs/report.schema.json").read_text())


def test_unpack_writes_a_dense_checkpoint(cli, place, tmp_path):
    done = cli("unpack", place / "small", tmp_path / "dense", "--quiet")
    assert done.out == f"wrote {tmp_path / 'dense'}\n"
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert config["model_type"] == "llama"
    assert "auto_map" not in config
    done = cli("unpack", tmp_path / "dense", tmp_path / "again", "--quiet")
    assert done.out == f"wrote {tmp_path / 'again'}, with the same tensors: they were dense already\n"


def test_runs_and_clean_list_and_remove(cli, place, tmp_path):
    shutil.copytree(place / "small.run", tmp_path / "x.run")
    assert cli("runs", tmp_path, "--json").json["runs"][0]["status"] == "passed"
    assert cli("clean", tmp_path / "x.run", "--dry-run").out.startswith("would remove nothing")
    assert cli("clean", tmp_path / "x.run", "--all").status == 0
    assert not (tmp_path / "x.run").exists()
    assert cli("runs", tmp_path).out == "no run folders here\n"


def test_version_is_printed(cli):
    import compress

    assert cli("--version").out == f"compress {compress.__version__}\n"


# --- processes of their own


def process(*command, **environment):
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("command", [["-m", "compress"], ["cli.py"]])
def test_launchers_run_the_command(command):
    done = process(sys.executable, *command, "passes")
    assert done.returncode == 0
    assert "prune_unstructured" in done.stdout


def test_commands_without_torch_import_none(place):
    """All of them in one cold interpreter."""
    (place / "bad.yaml").write_text("model: 3\n")
    commands = [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["check", "recipe.yaml"], 0),
        (["check", "bad.yaml"], 2),
        (["plan", "recipe.yaml"], 0),
        (["plan", "recipe.yaml", "--json"], 0),
        (["schema"], 0),
        (["passes"], 0),
        (["inspect", "model"], 0),
        (["gate", "small.run/report.json"], 0),
    ]
    code = (
        "import os, sys\n"
        "from compress.cli import main\n"
        f"os.chdir({str(place)!r})\n"
        f"for arguments, expected in {commands!r}:\n"
        "    sys.argv, status = ['compress', *arguments], 0\n"
        "    try:\n        main()\n    except SystemExit as end:\n        status = end.code or 0\n"
        "    assert status == expected, (arguments, status)\n"
        "    loaded = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "    assert not loaded, (arguments, loaded)\n"
    )
    done = process(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shell", ["bash", *(pytest.param(s, marks=pytest.mark.slow) for s in ("zsh", "fish"))])
def test_shell_completion_is_installed(shell):
    script = process(
        "compress",
        "--show-completion",
        shell,
        SHELL=f"/bin/{shell}",
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1",
    )
    assert script.returncode == 0, script.stderr
    assert "_COMPRESS_COMPLETE" in script.stdout
    words = {
        "bash": {"COMP_WORDS": "compress un", "COMP_CWORD": "1"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "compress un"},
        "fish": {"_TYPER_COMPLETE_ARGS": "compress un", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }
    done = process(
        str(Path(sys.executable).parent / "compress"), _COMPRESS_COMPLETE=f"complete_{shell}", **words[shell]
    )
    assert "unpack" in done.stdout


def test_closed_pipe_is_no_bug(place):
    done = subprocess.run(
        f"{sys.executable} -m compress schema | head -c 10",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr
