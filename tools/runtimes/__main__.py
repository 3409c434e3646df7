"""Open what this project writes in each runtime, compare, and write docs/runtimes.md. `make runtimes` runs it.

Each runtime has an environment of its own under build/runtimes, with the packages pinned in requirements.json. Finished cells
are kept in build/runtimes/cells; `--fresh` measures them again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "runtimes"
MODEL, TEXT = ROOT / "examples" / "tiny-lm", ROOT / "examples" / "text" / "valid.txt"
#: Checkpoints by name: settings of `cast`, None for the model itself.
ARTEFACTS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "int4": {"weights": "int4", "group_size": 32, "method": "rtn"},
    "int8": {"weights": "int8", "method": "rtn"},
}
#: Runtimes ▶ the form that they open and their script.
RUNTIMES = {
    "transformers": ("checkpoint", "run_transformers.py"),
    "onnxruntime": ("onnx", "run_onnxruntime.py"),
    "onnxruntime-genai": ("onnx", "run_genai.py"),
    "OpenVINO": ("onnx", "run_openvino.py"),
    "transformers.js": ("onnx", "run_transformers_js.mjs"),
    "llama.cpp": ("gguf", "run_llama_cpp.py"),
}
NODE = ("transformers.js", "llama.cpp")
TOKENS, PROMPT, NEW = 256, 32, 64


def requirements() -> dict[str, list[str]]:
    """Pinned packages by runtime."""
    pinned: dict[str, list[str]] = json.loads((HERE / "requirements.json").read_text())
    return pinned


def python(runtime: str) -> Path:
    """Python of a runtime's environment, which is made on first use."""
    folder = BUILD / "environments" / runtime
    command = folder / "bin" / "python"
    if not command.exists():
        venv.create(folder, with_pip=True)
        for package in requirements()[runtime]:  # one after another: torch first, so that nothing pulls in another
            subprocess.run([command, "-m", "pip", "install", "-q", package], check=True)
    return command


def node_modules() -> Path:
    """Packages of Node, installed on first use."""
    folder = BUILD / "environments" / "node"
    if not (folder / "node_modules").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run([*command, *requirements()["node"]], check=True)
    return folder / "node_modules"


def artefact(name: str, form: str) -> Path:
    """A checkpoint, or its export, written on first use by this package."""
    import compress

    settings = ARTEFACTS[name]
    source = MODEL if settings is None else BUILD / "artefacts" / name
    if settings is not None and not source.exists():
        compress.apply("cast", MODEL, source, progress=False, **settings)
    if form == "checkpoint":
        return source
    path = BUILD / "artefacts" / f"{name}{'-onnx' if form == 'onnx' else '.gguf'}"
    if not path.exists():
        compress.export(source, path, to=form, progress=False)
    return path


def asked() -> Path:
    """File with token ids and a text, from the held-out text of the examples."""
    from tokenizers import Tokenizer

    path, text = BUILD / "asked.json", TEXT.read_text()[:20_000]
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text).ids
    content = {"ids": ids[:TOKENS], "prompt": ids[:PROMPT], "new_tokens": NEW, "text": text, "text_ids": ids}
    path.write_text(json.dumps(content))
    return path


def cell(runtime: str, name: str, fresh: bool) -> dict[str, Any]:
    """Outputs of a runtime for an artefact: arrays by name, or ``error``."""
    form, script = RUNTIMES[runtime]
    target = BUILD / "cells" / f"{runtime}-{name}{'.json' if script.endswith('.mjs') else '.npz'}"
    if fresh or not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = ["node"] if script.endswith(".mjs") else [str(python(runtime))]
        if runtime in NODE:
            environment["NODE_MODULES"] = str(node_modules())
            environment["LLAMA_LIBS"] = str(node_modules() / "@node-llama-cpp" / "linux-x64" / "bins" / "linux-x64")
        command += [str(HERE / script), str(artefact(name, form)), str(asked()), str(target)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if "Error" in line] or ["no message"]
            return {"error": lines[-1][:160]}
    if target.suffix == ".json":
        content = json.loads(target.read_text())
        content["logits"] = np.fromfile(f"{target}.f32", np.float32).reshape(content["shape"])[0]
        return dict(content)
    return dict(np.load(target))


def log_softmax(logits: Any) -> Any:
    """In float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def words(values: dict[str, Any], reference: dict[str, Any], ids: list[int]) -> str:
    """A cell of the table."""
    if "error" in values:
        return f"no: {values['error']}"
    parts = []
    if "logits" in values:
        p, q = log_softmax(reference["logits"]), log_softmax(values["logits"])
        kl = max(0.0, float((np.exp(p) * (p - q)).sum(-1).mean()))
        parts.append(f"{np.abs(values['logits'] - reference['logits']).max():.1e}, KL {kl:.1e}")
    if "halves" in values:
        parts.append(f"in halves {np.abs(values['halves'] - values['logits']).max():.0e}")
    if "greedy" in values:
        parts.append(f"{int((values['greedy'] == reference['greedy']).sum())} of {NEW} tokens equal")
    if "text_ids" in values:
        given = [int(number) for number in values["text_ids"]]
        parts.append("ids of 20 kB equal" if given == ids else "ids of 20 kB differ")
    return "; ".join(parts)


def page(names: list[str], fresh: bool) -> Iterator[str]:
    """Lines of docs/runtimes.md."""
    ids = json.loads(asked().read_text())["text_ids"]
    references = {name: cell("transformers", name, fresh) for name in names}
    yield (HERE / "page.md").read_text().rstrip()
    yield ""
    yield f"| runtime | opens | {' | '.join(names)} |"
    yield f"|---|---|{'---|' * len(names)}"
    for runtime, (form, _) in RUNTIMES.items():
        cells = {name: cell(runtime, name, fresh) for name in names}
        version = next((str(values["version"]) for values in cells.values() if "version" in values), "")
        texts = [
            "the reference" if runtime == "transformers" else words(cells[name], references[name], ids)
            for name in names
        ]
        print(runtime, version, *texts, sep=" | ", file=sys.stderr, flush=True)
        yield f"| {runtime} {version} | {form} | {' | '.join(texts)} |"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="measure finished cells again")
    parser.add_argument("--artefacts", nargs="+", choices=ARTEFACTS, default=list(ARTEFACTS), help="columns")
    given = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    lines = list(page(given.artefacts, given.fresh))
    (ROOT / "docs" / "runtimes.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
