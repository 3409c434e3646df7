"""What llama.cpp's kernels for codes lose: `make bench-gguf-inputs [MODEL= HELDOUT=]`, a section of docs/benchmarks.md.

The matrices of MODEL are rounded to int4, and the result is exported to GGUF. KL is from that checkpoint in transformers,
float32, so a file shows only what the runtime rounds. Beside it: transformers with the kernels' rule, which rounds the inputs
of each product to 8 bits with a float16 scale for 32 of them (``block_q8_0`` in ggml-common.h). ``--blas``: the python of an
environment with llama-cpp-python built with BLAS, which multiplies prompts in float32; see tools/runtimes/llama_cpp_blas.py.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page, scoring  # noqa: E402
from tools.runtimes import llama_cpp  # noqa: E402


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--heldout", nargs="+", default=[str(ROOT / "examples/text/test.txt")])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--blas", help="python of an environment with llama-cpp-python that was built with BLAS")
    parser.add_argument("--section", default="gguf-inputs", help="of docs/benchmarks.md; '-' prints only")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="compress-bench-"))
    try:
        rows = list(measured(args, place))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    table = [
        f"## Inputs of {page.model_name(args.model)} in llama.cpp",
        "",
        f"`{page.command('bench-gguf-inputs', parser, args)}`: {page.environment()} llama.cpp of node-llama-cpp "
        f"{llama_cpp.VERSION}; `cast: {{weights: int4, group_size: 32, method: rtn}}`, embeddings as they are; {args.windows} "
        f"windows of {scoring.WINDOW} tokens of {Path(args.heldout[0]).name}. KL from the same checkpoint in transformers, "
        "float32, nats per token, with its standard error over tokens.",
        "",
        *page.table(["computed by", "KL", "median", "top-1"], rows),
    ]
    page.deliver(args.section, table)


def measured(args: argparse.Namespace, place: Path) -> Iterator[list[str]]:
    """A row for each way to compute."""
    import torch

    import compress

    windows, _ = scoring.token_windows(args.model, args.heldout[0], args.windows)
    compact = {"store": "compact"} if "gpt2" in (Path(args.model) / "config.json").read_text() else {}
    compress.apply("cast", args.model, place / "int4", weights="int4", group_size=32, method="rtn", **compact)
    compress.export(place / "int4", place / "float32.gguf", to="gguf", type="F32", embeddings="F32")
    compress.export(place / "int4", place / "codes.gguf", to="gguf", embeddings="F32")

    def computed(dtype: str, *, rounded: bool = False) -> Any:
        model = compress.load(place / "int4", dtype=dtype)
        if rounded:
            round_inputs(model)
        with torch.inference_mode():
            return torch.cat([model(window[None]).logits for window in windows]).double().log_softmax(-1)

    def in_llama_cpp(name: str, **options: Any) -> Any:
        with llama_cpp.Model(place / name, length=scoring.WINDOW, **options) as model:
            return torch.from_numpy(model.logits(windows.numpy())).double().log_softmax(-1)

    exact = computed("float32")
    yield row("llama.cpp, the same values as F32", exact, in_llama_cpp("float32.gguf", wide_cache=True))
    yield row("llama.cpp, Q4_0", exact, in_llama_cpp("codes.gguf"))
    yield row("llama.cpp, Q4_0, no repacking", exact, in_llama_cpp("codes.gguf", repacked=False))
    yield row("llama.cpp, Q4_0, float32 cache", exact, in_llama_cpp("codes.gguf", wide_cache=True))
    if args.blas:
        yield row("llama.cpp built with BLAS, Q4_0, float32 cache", exact, with_blas(args.blas, place, windows.numpy()))
    single, double = computed("float32", rounded=True), computed("float64", rounded=True)
    yield row("transformers, inputs rounded", exact, single)
    yield row("the same in float64, from it in float32", single, double)


def with_blas(python: str, place: Path, ids: Any) -> Any:
    """Logarithms of the probabilities of ``codes.gguf``, float64 [windows, tokens, vocabulary]."""
    import numpy as np
    import torch

    np.save(place / "ids.npy", ids)
    script = ROOT / "tools/runtimes/llama_cpp_blas.py"
    subprocess.run(
        [python, "-P", script, *(place / name for name in ("codes.gguf", "ids.npy", "logits.npy"))], check=True
    )
    return torch.from_numpy(np.load(place / "logits.npy")).double().log_softmax(-1)


def round_inputs(model: Any) -> None:
    """Round the inputs of matrices but the head as llama.cpp's CPU kernels do."""
    import torch
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not model.get_output_embeddings():
            module.register_forward_pre_hook(lambda _, inputs: (q8_0(inputs[0]),))


def q8_0(values: Any) -> Any:
    """Values [..., n·32] rounded to int8 codes times a float16 scale for each 32."""
    import torch

    blocks = values.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = torch.where(largest > 0, blocks * (127 / largest), 0).round()
    return (codes * (largest / 127).half().to(values.dtype)).flatten(-2)


def row(name: str, exact: Any, given: Any) -> list[str]:
    """Name, divergence with its standard error, its median, and agreement; printed, too."""
    divergence = (exact.exp() * (exact - given)).sum(-1).flatten()
    error = divergence.std() / divergence.numel() ** 0.5
    same = (exact.argmax(-1) == given.argmax(-1)).double().mean()
    cells = [name, f"{divergence.mean():.2g} ± {error:.1g}", f"{divergence.median():.2g}", f"{same:.4f}"]
    print(" | ".join(cells), flush=True)
    return cells


if __name__ == "__main__":
    main()
