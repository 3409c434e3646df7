"""The wheel in a fresh environment: the commands that a first user types, word for word from the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests import pico
from tests.conftest import ROOT


def installed(folder: Path) -> Path:
    """The programs of an environment with the wheel; what it depends on comes from the environment of the tests."""
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*wheel, str(folder), str(ROOT)], check=True)
    venv.create(folder / "env", with_pip=False, symlinks=True)
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    packages.joinpath("usual.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    (file,) = folder.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "env/bin/python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--force-reinstall", str(file)], check=True)
    return folder / "env" / "bin"


@pytest.mark.slow
def test_wheel_does_what_the_readme_types_first(tmp_path):
    programs, work = installed(tmp_path), tmp_path / "work"
    work.mkdir()
    pico.save(work / "my-model", "llama")
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## A model of your own")[2]
    block = re.search(r"```sh\n(.*?)```", text, re.DOTALL)
    assert block
    typed = [line for line in block[1].splitlines() if line.startswith("compress ")]
    assert [line.split()[1] for line in typed] == ["init", "plan", "run"]
    names = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = {**names, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONSAFEPATH": "1"}
    load = "import compress; print(compress.__file__); compress.load('my-model-small')"
    for command in ("\n".join(typed), f'python -c "{load}"'):
        done = subprocess.run(
            ["bash", "-euc", command], cwd=work, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert str(tmp_path / "env") in done.stdout  # the wheel, and not the sources
    assert (work / "my-model-small.run" / "report.html").is_file()
