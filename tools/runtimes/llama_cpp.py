"""llama.cpp through its C library: outputs, quantisation and speed of GGUF files. Needs numpy, and npm once.

The library is the prebuilt one of `compress.evaluation.llama_cpp`, in ``build/runtimes/llama.cpp``. As a command it reads and
writes files, so that it can run in an environment of its own:

    python tools/runtimes/llama_cpp.py logits model.gguf ids.npy out.npy     # ids [samples, length] ▶ float32 logits
    python tools/runtimes/llama_cpp.py tokens model.gguf text.txt out.npy    # without special tokens around it
    python tools/runtimes/llama_cpp.py ASKED.json model.gguf out.npz […]     # as the other scripts of runtimes
    python tools/runtimes/llama_cpp.py quantize in.gguf out.gguf Q4_K_M [imatrix.gguf]
    python tools/runtimes/llama_cpp.py speed model.gguf [tokens] [threads]   # decoded tokens per second
"""

from __future__ import annotations

import ctypes as C
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from compress.evaluation import llama_cpp as core  # noqa: E402
from compress.evaluation.llama_cpp import PACKAGE, VERSION  # noqa: E402
from tools.runtimes.each import each  # noqa: E402

HOME = ROOT / "build" / "runtimes" / "llama.cpp"
#: Names of whole files' types ▶ their number (``llama_ftype``).
TYPES = {
    "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17,
    "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32,
}  # fmt: skip


def libraries() -> Path:
    """Folder of the shared libraries; npm fetches the package on the first call."""
    place = HOME / VERSION
    if (folder := core.find_libraries(place)) is None:
        place.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"], cwd=HOME, check=True, capture_output=True, text=True
        )
        subprocess.run(["tar", "xzf", str(HOME / packed.stdout.split()[-1]), "-C", str(place)], check=True)
        folder = core.find_libraries(place)
    assert folder is not None
    return folder


class Model(core.Model):
    """A GGUF file, loaded by that library; options as there."""

    def __init__(self, path: str | Path, **options: Any) -> None:
        super().__init__(path, libraries(), **options)


def quantize(source: Path, target: Path, kind: str, imatrix: dict[str, np.ndarray] | None = None) -> None:
    """llama.cpp's own quantisation of a file. ``imatrix``: mean squares of inputs by the matrix's name."""
    lib = core.library(libraries())
    options = lib.model_quantize_default_params()
    options.i[0], options.i[1] = 1, TYPES[kind]
    kept = []
    if imatrix is not None:
        entries = (core.InputMeans * (len(imatrix) + 1))()
        for place, (name, values) in enumerate(imatrix.items()):
            kept.append(flat := np.ascontiguousarray(values, np.float32).ravel())
            entries[place] = core.InputMeans(name.encode(), flat.ctypes.data_as(C.POINTER(C.c_float)), flat.size)
        C.cast(C.byref(options, 24), C.POINTER(C.c_void_p))[0] = C.cast(entries, C.c_void_p)
    core.said.clear()
    if lib.model_quantize(os.fsencode(source), os.fsencode(target), C.byref(options)):
        raise RuntimeError("; ".join(core.said[:3]) or "the file cannot be quantised")


def outputs(file: str, asked: dict[str, Any]) -> dict[str, Any]:
    """``logits`` [tokens, vocabulary], ``greedy`` and ``text_ids``."""
    ids, prompt = asked["ids"], asked["prompt"]
    with Model(file, length=len(ids)) as model:
        values: dict[str, Any] = {"logits": model.step(ids)}
        model.renew()
        state, tokens, start = model.step(prompt), [], time.perf_counter()
        for number in range(asked["new_tokens"]):
            tokens.append(int(state[-1].argmax()))
            state = model.step(tokens[-1:], len(prompt) + number)
        values |= {"greedy": np.array(tokens), "seconds": time.perf_counter() - start}
        version = f"{model.lib.version} of node-llama-cpp {VERSION}"
        return {**values, "text_ids": np.array(model.tokens(asked["text"])), "version": version}


def main(arguments: list[str]) -> None:
    """The command line."""
    match arguments:
        case ["logits", file, ids, out]:
            samples = np.load(ids)
            with Model(file, length=max(32, samples.shape[1])) as model:
                np.save(out, model.logits(samples))
        case ["tokens", file, text, out]:
            with Model(file) as model:
                np.save(out, np.array(model.tokens(Path(text).read_text(encoding="utf-8"))))
        case ["quantize", source, target, kind, *rest]:
            means = None
            if rest:
                from compress.exports.gguf.imatrix import read_imatrix

                means = read_imatrix(Path(rest[0]))
            quantize(Path(source), Path(target), kind, means)
        case [asked, *_] if asked.endswith(".json"):
            each(outputs)
        case ["speed", file, *rest]:
            tokens, threads = (int(x) for x in [*rest, "64", "1"][:2]) if len(rest) != 1 else (int(rest[0]), 1)
            with Model(file, length=16 + tokens, threads=threads) as model:
                print(f"{1 / model.seconds(16, tokens)[1]:.2f} tokens per second")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
