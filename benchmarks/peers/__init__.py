"""Other tools on the same model, calibration ids and held-out texts, each in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


def call(
    python: str, tool: str, model: str, ids: str, job: str, out: str | Path, code: str | None = None
) -> dict[str, Any]:
    """Let the worker of a tool, a module of this package, do a job such as ``GPTQ int4``.

    The dense float32 result goes to the folder ``out``. Returns ``cpu_s`` and ``wall_s`` of the tool alone, and ``peak_mib`` of
    its process. ``code``: alps.py as published. The program ends with the worker's error if it fails.
    """
    method, _, amount = job.rpartition(" ")
    request = {"model": str(Path(model).resolve()), "ids": ids, "method": method, "amount": amount, "out": str(out)}
    command = [python, "-m", f"benchmarks.peers.{tool}", json.dumps({**request, "code": code})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def timed(*arguments: Any, **more: Any) -> dict[str, Any]:
    """As `call`, without keeping the result."""
    with tempfile.TemporaryDirectory() as scratch:
        return call(*arguments, f"{scratch}/out", **more)
