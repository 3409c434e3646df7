"""CPU seconds of calibrated passes beside one forward pass: `make bench-scale [MODEL=] [PEER=/path/to/python] [ARGS=]`.

In one process, on the same 64 x 256 random token ids: a forward pass of the blocks in float32, the sums of the Hessians of the
inputs of their matrices, and the pass itself, from the folder to the written checkpoint. Models: MODEL, and random weights of
a Llama of 124 M parameters (--wide). Other tools get the same ids and as many threads, each in a process of its own right
after: PEER is the interpreter of an environment that has llmcompressor; --alps and --autoround are those of
`benchmarks/versus.py`. Read the ratios: a machine that does other work slows all alike.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page, peers  # noqa: E402
from benchmarks.versus import PEERS, wide  # noqa: E402

#: Passes and their settings by job, those of `benchmarks/versus.py`.
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("cast", {"weights": "int4", "error_correction": [], "reconstruction_epochs": 0}),
    "sparsegpt": ("prune_unstructured", {"method": "sparsegpt", "sparsity": 0.6, "reconstruction_epochs": 0}),
    "alps": ("prune_unstructured", {"method": "alps", "sparsity": 0.6, "reconstruction_epochs": 0}),
    "tuned": ("cast", {"weights": "int4"}),
    "asymmetric": ("cast", {"weights": "int4", "error_correction": ["asymmetric"], "reconstruction_epochs": 0}),
}
#: Tokens of a forward pass, as in a run over the blocks.
TOKENS = 1024


def forward_and_sums(folder: str, ids: Any) -> tuple[float, float]:
    """CPU seconds of a forward pass of all blocks on the ids, and of the Hessians of what their matrices read."""
    import torch
    from transformers import AutoModelForCausalLM

    from compress.blockwise.hessians import InputStatistics, hessian_dtype

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).base_model.eval()
    spent = 0.0
    sums: dict[str, InputStatistics] = {}
    last: list[torch.Tensor | None] = [None]

    def adder(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            nonlocal spent
            if args[0] is last[0]:
                return  # matrices that read the same share a Hessian
            last[0], start = args[0], time.process_time()
            width = args[0].shape[-1]
            if name not in sums:
                hessian = torch.zeros(width, width, dtype=hessian_dtype(width))
                sums[name] = InputStatistics(hessian, batch=4 * TOKENS)
            sums[name].add(args[0].reshape(-1, width))
            spent += time.process_time() - start

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(adder(name))
    start = time.process_time()
    with torch.no_grad():
        for rows in ids.split(max(1, TOKENS // ids.shape[1])):
            model(input_ids=rows, use_cache=False)
    whole = time.process_time() - start
    start = time.process_time()
    for one in sums.values():
        one.finish()
    return whole - spent, spent + time.process_time() - start


def ours(job: str, folder: str, ids: Any) -> float:
    """CPU seconds of the pass, reading and writing included."""
    import compress

    name, settings = JOBS[job]
    with tempfile.TemporaryDirectory() as scratch:
        start = time.process_time()
        compress.apply(name, folder, f"{scratch}/out", data=ids, **settings)
        return time.process_time() - start


def beside(job: str, args: argparse.Namespace, folder: str, ids: Path) -> tuple[str, float] | None:
    """The tool that has the same job, and its CPU seconds; None where none was given."""
    if job not in PEERS:
        return None
    module, its, name = PEERS[job]
    given = {"llm_compressor": args.peer, "alps": args.alps and sys.executable, "auto_round": args.autoround}
    if not given[module]:
        return None
    return name, peers.timed(given[module], module, folder, str(ids), its, code=args.alps)["cpu_s"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="python of an environment with llmcompressor")
    parser.add_argument("--alps", help="alps.py as published")
    parser.add_argument("--autoround", help="python of an environment with auto-round")
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--wide", action="store_true", help="the random model too")
    parser.add_argument("--blocks", type=int, default=12, help="of the random model")
    parser.add_argument("--jobs", nargs="+", default=["gptq", "sparsegpt"], choices=JOBS)
    parser.add_argument("--section", default="scale")
    args = parser.parse_args()
    import torch
    from safetensors.torch import save_file

    scratch = Path(tempfile.mkdtemp(prefix="compress-bench-"))
    rows: list[list[str]] = []
    try:
        models = [args.model]
        if args.wide:
            name = "llama-124m" if args.blocks == 12 else f"llama-124m, {args.blocks} of 12 blocks"
            wide(scratch / name, args.model, args.blocks)
            models.append(str(scratch / name))
        example = str(ROOT / "examples/tiny-lm")
        for job in args.jobs:
            ours(job, example, torch.randint(0, 100, (2, 32)))  # imports, once
        for model in models:
            vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
            ids = torch.randint(0, vocabulary, (64, 256), generator=torch.Generator().manual_seed(0))
            save_file({"ids": ids}, scratch / "ids.safetensors")
            for job in args.jobs:
                forward, sums = forward_and_sums(model, ids)
                own = ours(job, model, ids)
                other = beside(job, args, model, scratch / "ids.safetensors")
                rows.append(
                    [
                        Path(model).name,
                        job,
                        f"{own:.1f}",
                        f"{forward:.1f}",
                        f"{sums:.1f}",
                        f"{own / (forward + sums):.2f}",
                    ]
                    + (["–"] * 3 if other is None else [other[0], f"{other[1]:.1f}", f"{own / other[1]:.2f}"])
                )
                print(*rows[-1], flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    page.deliver(
        args.section,
        [
            "## CPU seconds beside one forward pass",
            "",
            f"`{page.command('bench-scale', parser, args)}`: {page.environment()} {torch.get_num_threads()} thread(s). "
            "64 × 256 tokens; CPU seconds. The pass: from the folder to the written checkpoint, checks included. Forward: of "
            "the same tokens through the blocks, float32. Sums: Hessians of the inputs of all matrices.",
            "",
            *page.table(
                ["model", "job", "pass", "forward", "sums", "pass / (forward + sums)", "beside", "its", "pass / that"],
                rows,
            ),
        ],
    )


if __name__ == "__main__":
    main()
