"""Outputs of runtimes for artefacts, computed in the runtimes' environments and kept in build/runtimes/cells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CompressError
from tools.runtimes.environments import BUILD, HERE, node_modules, python
from tools.runtimes.models import artefact, asked

#: Runtime ▶ the form that it opens and its script.
RUNTIMES = {
    "compress": ("checkpoint", "run_compress.py"),
    "transformers": ("checkpoint", "run_transformers.py"),
    "lm-eval": ("checkpoint", "run_lm_eval.py"),
    "vLLM": ("checkpoint", "run_vllm.py"),
    "llama.cpp": ("gguf", "llama_cpp.py"),
    "onnxruntime": ("onnx", "run_onnxruntime.py"),
    "onnxruntime-genai": ("onnx", "run_genai.py"),
    "OpenVINO": ("onnx", "run_openvino.py"),
    "transformers.js": ("onnx", "run_transformers_js.mjs"),
    "sentence-transformers": ("onnx", "run_sentence_transformers.py"),
}


def cells(runtime: str, model: str, names: Iterable[str], fresh: bool) -> dict[str, dict[str, Any]]:
    """Outputs by name of the artefact: arrays by name, or ``error``, one line. A Python runtime starts once for all."""
    form, script = RUNTIMES[runtime]
    folder = _folder(model)
    folder.mkdir(parents=True, exist_ok=True)
    targets = {name: folder / f"{runtime}-{name.replace(' ', '-')}.npz" for name in names}
    missing = {name: target for name, target in targets.items() if fresh or not target.exists()}
    opened = dict(_opened(model, missing, form))
    if opened:
        pairs = {path: missing[name] for name, path in opened.items()}
        (_run_node if script.endswith(".mjs") else _run_python)(runtime, script, model, pairs)
    return {name: {key: _plain(value) for key, value in np.load(target).items()} for name, target in targets.items()}


def _folder(model: str) -> Path:
    return BUILD / "cells" / model.replace(" ", "-")


def _plain(value: Any) -> Any:
    return value.item() if value.ndim == 0 else value


def _opened(model: str, missing: dict[str, Path], form: str) -> Iterator[tuple[str, Path]]:
    """The files of artefacts; a refusal of this package is written as their output."""
    for name, target in missing.items():
        target.unlink(missing_ok=True)
        try:
            yield name, artefact(model, name, form)
        except CompressError as error:
            np.savez(target, error=error.what)


def _run_python(runtime: str, script: str, model: str, pairs: dict[Path, Path]) -> None:
    command = sys.executable if runtime == "compress" else str(python(runtime))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if runtime != "compress":
        environment.pop("PYTHONPATH", None)
    arguments = [str(path) for pair in pairs.items() for path in pair]
    result = subprocess.run(
        [command, str(HERE / script), str(asked(model)), *arguments],
        env=environment, cwd=BUILD, capture_output=True, text=True, check=False,
    )  # fmt: skip
    (_folder(model) / f"{runtime}.log").write_text(result.stdout + result.stderr)
    for target in pairs.values():
        if not target.exists():
            np.savez(target, error=f"the process ended with status {result.returncode}: {_last_line(result.stderr)}")


def _run_node(runtime: str, script: str, model: str, pairs: dict[Path, Path]) -> None:
    environment = {**os.environ, "NODE_MODULES": str(node_modules())}
    arguments = [str(path) for source, target in pairs.items() for path in (source, target.with_suffix(".json"))]
    command = ["node", str(HERE / script), str(asked(model)), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (_folder(model) / f"{runtime}.log").write_text(result.stdout + result.stderr)
    for target in pairs.values():
        content = target.with_suffix(".json")
        values = json.loads(content.read_text()) if content.exists() else {"error": _last_line(result.stderr)}
        if "shape" in values:
            data = Path(f"{content}.f32")
            values["logits"] = np.fromfile(data, np.float32).reshape(values.pop("shape"))[0]
            data.unlink()
        content.unlink(missing_ok=True)
        np.savez(target, **values)


def _last_line(text: str) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])
