"""Environments of runtimes under build/runtimes, one each, with the packages pinned in requirements.json."""

from __future__ import annotations

import json
import subprocess
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent.parent / "build" / "runtimes"


def requirements() -> dict[str, list[str]]:
    """Arguments of pip, or of npm, by environment."""
    pinned: dict[str, list[str]] = json.loads((HERE / "requirements.json").read_text())
    return pinned


def python(name: str) -> Path:
    """Python of an environment, which is made on first use."""
    folder = BUILD / "environments" / name
    command, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        for packages in requirements()[name]:  # one after another: torch first, so that nothing pulls in another
            subprocess.run([command, "-m", "pip", "install", "-q", *packages.split()], check=True, cwd=HERE)
        ready.touch()
    return command


def node_modules() -> Path:
    """Packages of Node, installed on first use."""
    folder = BUILD / "environments" / "node"
    if not (folder / "node_modules").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run([*command, *requirements()["node"]], check=True)
    return folder / "node_modules"
