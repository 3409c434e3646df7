"""No command sends control characters of a checkpoint, a recipe or an argument to the terminal."""

from __future__ import annotations

import json
import shutil
import sys
import unicodedata

import pytest

from compress.cli import main
from tests.toolbox import edit_config, entry, raw

OWNED = "\x1b]0;owned\x07\x9b31m\u202e"


@pytest.fixture
def cli(capsys, monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        for text in (out, err):
            assert not [c for c in text if not c.isprintable() and c not in "\n\t" and unicodedata.category(c) != "Zs"]
        return caught.value.code or 0, out, err

    return call


@pytest.fixture
def hostile(tmp_path):
    """A checkpoint of no known family whose names are hostile, in a folder whose name is."""
    folder = tmp_path / f"m{OWNED}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": f"x{OWNED}", "architectures": [f"X{OWNED}"]}))
    (folder / "model.safetensors").write_bytes(raw({f"a{OWNED}.weight": entry(0, 4, [1])}, b"1234"))
    return folder


@pytest.mark.parametrize("options", [(), ("--tensors",), ("--zeros",), ("--json",)])
def test_inspect_escapes_hostile_names(options, hostile, cli):
    status, out, _ = cli("inspect", hostile, *options)
    assert status == 0
    if "--json" in options:
        assert json.loads(out)["tensors"][0]["name"] == f"a{OWNED}.weight"
    else:
        assert "\\x1b]0;owned\\x07" in out.replace("\n", "")


def test_errors_recipes_and_diffs_escape_hostile_names(hostile, cli, tmp_path, pico_llama):
    status, _, err = cli("inspect", tmp_path / f"none{OWNED}")
    assert (status, err.count("\n")) == (2, 1)
    (tmp_path / f"r{OWNED}.yaml").write_text(
        json.dumps({"model": str(hostile), "output": str(tmp_path / "o"), "passes": [{"cast": {"weights": "bf16"}}]})
    )
    assert cli("check", tmp_path / f"r{OWNED}.yaml")[0] == 0
    assert cli("check", tmp_path / f"r{OWNED}.yaml", "--resolved")[0] == 0
    assert cli("plan", tmp_path / f"r{OWNED}.yaml")[0] == 0
    (tmp_path / "bad.yaml").write_text(json.dumps({f"k{OWNED}": f"\n{OWNED}"}))
    assert cli("check", tmp_path / "bad.yaml")[0] == 2
    assert cli("run", tmp_path / f"r{OWNED}.yaml")[0] == 0  # a float cast needs no class
    assert cli("eval", hostile, "--data", tmp_path / "bad.yaml")[0] == 2
    other = shutil.copytree(hostile, tmp_path / "other")
    edit_config(other, model_type="y", **{f"k{OWNED}": OWNED})
    assert cli("diff", hostile, other)[0] == 0
    assert cli("eval", pico_llama, "--data", tmp_path / f"{OWNED}.txt", "--metric", "x\x1b")[0] == 2
    assert cli(f"--x{OWNED}")[0] == 2
    assert cli("inspect", hostile, f"--x{OWNED}")[0] == 2
