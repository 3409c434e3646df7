"""Other tools beside ours: `make bench-peers PEER=PYTHON [MODEL= TRAIN= HELDOUT=] ARGS="--tool TOOL --jobs …"`.

PEER is the interpreter of an environment of its own, with torch, transformers and the tool. TOOL is `llm-compressor`,
`auto-round`, `libgguf` (llama.cpp's codes), or `ALPS`, for which --code is the file alps.py of mazumder-lab/ALPS, and PEER
may be left out. A job is a method and an amount: `GPTQ int4`, `GPTQ asymmetric int4`, `AutoRound int4`, `SparseGPT 50%`,
`ALPS 2:4`, `imatrix IQ2_XS`. All get the ids that `compress.apply` draws from TRAIN.

The figures go to benchmarks/peers_MODEL.json, where other benchmarks find them for their column "others", and all of that file
go to the section "Peers" of docs/benchmarks.md. A job that stands in the file is measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import page, scoring
from benchmarks.peers import call

#: Module of the worker, and the package whose version is named.
TOOLS = {
    "llm-compressor": ("llm_compressor", "llmcompressor"),
    "auto-round": ("auto_round", "auto-round"),
    "ALPS": ("alps", None),
    "libgguf": ("gguf_codes", "libgguf"),
}
FIGURES = ["rise", "kl", "bits_per_byte", "second_rise", "second_kl", "cpu_s", "peak_mib"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=sys.executable, help="python of an environment with the tool")
    parser.add_argument("--tool", required=True, choices=TOOLS)
    parser.add_argument("--code", help="alps.py as published")
    parser.add_argument("--model", default=str(scoring.ROOT / "examples/tiny-lm"))
    parser.add_argument("--train", default=str(scoring.ROOT / "examples/text/train.txt"))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--jobs", nargs="+", required=True, help="method and amount, as one word each")
    scoring.options(parser)
    args = parser.parse_args()
    for job in args.jobs:
        if len(job.split()) < 2:
            parser.error(f"{job!r} is no method and amount; write such as 'AutoRound int4'")
    from safetensors.torch import save_file

    texts = None
    scratch = Path(tempfile.mkdtemp(prefix="compress-bench-"))
    try:
        samples = scoring.calibration_samples(args.model, args.train, args.samples)
        save_file({"ids": samples.ids.contiguous()}, scratch / "ids.safetensors")
        for job in args.jobs:
            row = measured(args, job, scratch)
            texts = texts or scoring.held_out(args)
            row |= texts.figures(texts.score(scratch / "out"))
            page.keep_peer(args.model, row)
            print(json.dumps(row, ensure_ascii=False), flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if texts:
        page.put(f"peers-{page.model_name(args.model)}", section(parser, args, texts))


def measured(args: argparse.Namespace, job: str, scratch: Path) -> dict[str, Any]:
    """One job of the tool: its name with version, CPU and wall seconds, peak MiB. The result is in the folder ``out``."""
    module, package = TOOLS[args.tool]
    method, _, amount = job.rpartition(" ")
    shutil.rmtree(scratch / "out", ignore_errors=True)
    answer = call(args.peer, module, args.model, str(scratch / "ids.safetensors"), job, scratch / "out", args.code)
    tool = "ALPS as published"
    if package:
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        number = subprocess.run([args.peer, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        tool = f"{args.tool} {number}"
    return {"tool": tool, "method": method, "amount": amount, **answer}


def section(parser: argparse.ArgumentParser, args: argparse.Namespace, texts: scoring.HeldOut) -> list[str]:
    """The table of all figures that are known of a model."""
    rows = [
        [one["tool"], one["method"], one["amount"], *(shown(key, one.get(key)) for key in FIGURES)]
        for one in sorted(page.known_peers(args.model), key=lambda one: (one["amount"], one["rise"]))
    ]
    return [
        f"## Other tools on {page.model_name(args.model)}",
        "",
        f"`{page.command('bench-peers', parser, args)}` and the like: {page.environment()} "
        f"{args.samples} × {scoring.WINDOW} calibration tokens, those that `compress.apply` draws from "
        f"{Path(args.train).name}. {texts.note()} Integers in groups of 64. Head and embeddings stay. CPU seconds are of the "
        "method alone, with one thread, beside other jobs.",
        "",
        *page.table(["tool", "method", "amount", *scoring.COLUMNS, "CPU s", "peak MiB"], rows),
    ]


def shown(key: str, value: float | None) -> str:
    """A figure of the table."""
    if value is None:
        return "–"
    return (
        f"{value:+.4f}" if key.endswith("rise") else f"{value:,.0f}" if key in ("cpu_s", "peak_mib") else f"{value:.4f}"
    )


if __name__ == "__main__":
    main()
