"""Wall time beside other tools' for the same job: `make bench-versus PEER=/path/to/python [ARGS=]`.

PEER is the interpreter of an environment of its own with torch and llmcompressor. Both prune by SparseGPT (60 %) or cast by
GPTQ (4 bits, groups of 64, activation order) on the same 128 x 256 random token ids, in turns; the time is that of the method,
without loading and writing. Models: MODEL, and random weights of a Llama of 124 M parameters, 12 blocks of width 768 (--wide).
The job `alps` runs beside the published code: --alps is the file alps.py of mazumder-lab/ALPS. The job `tuned` is the default
int4 beside auto-round (200 steps a block, its default), with --autoround the interpreter of an environment that has it. The
other tools run as in `benchmarks.peers`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page, peers  # noqa: E402

OURS = """
import json, sys, tempfile
sys.path.insert(0, sys.argv[1])
import compress
from safetensors.torch import load_file
name, settings = {"sparsegpt": ("prune_unstructured", {"method": "sparsegpt", "sparsity": 0.6, "reconstruction_epochs": 0}),
                  "alps": ("prune_unstructured", {"method": "alps", "sparsity": 0.6, "reconstruction_epochs": 0}),
                  "gptq": ("cast", {"weights": "int4", "error_correction": [], "reconstruction_epochs": 0}),
                  "tuned": ("cast", {"weights": "int4"})}[sys.argv[2]]
details = {}
with tempfile.TemporaryDirectory() as folder:
    compress.apply(name, sys.argv[3], folder + "/out", data=load_file(sys.argv[4])["ids"], details=details, **settings)
print(json.dumps({"seconds": sum(block["seconds"] for block in details["blocks"])}))
"""

#: Module of a tool's worker in `benchmarks.peers`, its job, and its name in the table.
PEERS = {
    "sparsegpt": ("llm_compressor", "SparseGPT 60%", "llm-compressor"),
    "gptq": ("llm_compressor", "GPTQ int4", "llm-compressor"),
    "alps": ("alps", "ALPS 60%", "alps.py as published"),
    "tuned": ("auto_round", "AutoRound int4", "auto-round"),
}


def seconds(python: str, script: str, *arguments: str) -> float:
    """What a script says at its end that it took."""
    done = subprocess.run([python, "-c", script, str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def wide(folder: Path, tokenizer: str, blocks: int = 12) -> None:
    """Random float32 weights of a larger shape; the peer wants a tokenizer beside them."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=768, num_hidden_layers=blocks, intermediate_size=2048, num_attention_heads=12,
        num_key_value_heads=4, dtype="float32",
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", default=sys.executable, help="python of an environment with llmcompressor")
    parser.add_argument("--alps", help="alps.py as published")
    parser.add_argument("--autoround", help="python of an environment with auto-round")
    parser.add_argument("--section", default="versus")
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--wide", action="store_true", help="the larger random model too")
    parser.add_argument(
        "--blocks", type=int, default=12, help="of the larger model, whose time grows with their number"
    )
    parser.add_argument("--rounds", type=int, default=3, help="on MODEL; 0: not on it. Once on the larger one")
    parser.add_argument(
        "--jobs", nargs="+", default=["sparsegpt", "gptq"], choices=["sparsegpt", "alps", "gptq", "tuned"]
    )
    args = parser.parse_args()
    import torch
    from safetensors.torch import save_file

    scratch = Path(tempfile.mkdtemp(prefix="compress-bench-"))
    rows: list[list[str]] = []
    try:
        vocabulary = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
        ids = torch.randint(0, vocabulary, (128, 256), generator=torch.Generator().manual_seed(0))
        save_file({"ids": ids}, scratch / "ids.safetensors")
        models = [args.model] if args.rounds else []
        if args.wide:
            name = "llama-124m" if args.blocks == 12 else f"llama-124m, {args.blocks} of 12 blocks"
            wide(scratch / name, args.model, args.blocks)
            models.append(str(scratch / name))
        for model in models:
            for job in args.jobs:
                pairs = []
                module, its, peer = PEERS[job]
                python = {"alps": sys.executable, "tuned": args.autoround}.get(job, args.peer)
                file = str(scratch / "ids.safetensors")
                for _ in range(args.rounds if model == args.model else 1):
                    theirs = peers.timed(python, module, model, file, its, code=args.alps)["wall_s"]
                    pairs.append((seconds(sys.executable, OURS, job, model, file), theirs))
                shown = (" ".join(f"{pair[i]:.1f}" for pair in pairs) for i in (0, 1))
                ratio = statistics.median(a / b for a, b in pairs)
                rows.append([Path(model).name, job, next(shown), peer, next(shown), f"{ratio:.2f}"])
                print(*rows[-1], flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    page.put(
        args.section,
        [
            "## Time beside other tools",
            "",
            f"`make bench-versus`: {page.environment()} {threads} each. SparseGPT and ALPS at 60 %, int4 by GPTQ alone and "
            "by the default (`tuned`), 128 × 256 tokens; seconds of the method alone, in turns on the same machine; "
            "the ratio is the median of the pairs'.",
            "",
            *page.table(["model", "job", "compress, s", "beside", "its s", "ratio"], rows),
        ],
    )


if __name__ == "__main__":
    main()
