"""Wall time beside other tools' for the same job: `make bench-versus PEER=/path/to/python [ARGS=]`.

PEER is the interpreter of an environment of its own with torch and llmcompressor. Both prune by SparseGPT (60 %) or cast by
GPTQ (4 bits, groups of 64, activation order) on the same 128 x 256 random token ids, in turns; the time is that of the method,
without loading and writing. Models: MODEL, and random weights of a Llama of 124 M parameters, 12 blocks of width 768 (--wide).
The job `alps` runs beside the published code: --alps is the file alps.py of mazumder-lab/ALPS, which wants a GPU; its `cuda:0`
is read as `cpu`, and block by block it gets what its own llama.py would give it. The job `tuned` is the default int4 beside
auto-round (200 steps a block, its default), with --autoround the interpreter of an environment that has it.
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

from benchmarks import page  # noqa: E402

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

PEER = """
import json, sys, time
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
ids = load_file(sys.argv[4])["ids"]
model = AutoModelForCausalLM.from_pretrained(sys.argv[3], dtype=torch.float32)
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=64, actorder="static")
modifier = {
    "sparsegpt": lambda: SparseGPTModifier(sparsity=0.6, mask_structure="0:0", ignore=["re:.*lm_head.*"]),
    "gptq": lambda: GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=args)}, ignore=["lm_head"]
    ),
}[sys.argv[2]]()
start = time.perf_counter()
oneshot(model=model, dataset=data, recipe=[modifier], max_seq_length=ids.shape[1], num_calibration_samples=len(ids))
print(json.dumps({"seconds": time.perf_counter() - start}))
"""

ALPS = """
import json, sys, time, types
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
published = types.ModuleType("alps")
exec(Path(sys.argv[5]).read_text().replace("cuda:0", "cpu"), published.__dict__)
torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None
ids = load_file(sys.argv[4])["ids"]
model = AutoModelForCausalLM.from_pretrained(sys.argv[3], dtype=torch.float32).eval()
start = time.perf_counter()
with torch.no_grad():
    inputs, blocks = [], model.model.layers
    class Stop(Exception):
        pass
    def catch(module, args, kwargs):
        inputs.append((args[0], {**kwargs, "past_key_values": None}))
        raise Stop
    handle = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in ids:
        try:
            model(row[None], use_cache=False)
        except Stop:
            pass
    handle.remove()
    for block in blocks:
        layers = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
        solvers = [published.ALPS_prune(layer, nsamples=len(ids), seqlen=ids.shape[1]) for layer in layers]
        handles = [
            layer.register_forward_hook(lambda _, x, y, solver=solver: solver.add_batch(x[0].data, y.data))
            for layer, solver in zip(layers, solvers, strict=True)
        ]
        for x, rest in inputs:
            block(x, **rest)
        for handle in handles:
            handle.remove()
        for solver in solvers:
            solver.ALPS_admm(sp=0.6, rho=0.1)
            solver.free()
        outputs = [block(x, **rest) for x, rest in inputs]
        inputs = [(y[0] if isinstance(y, tuple) else y, rest) for y, (_, rest) in zip(outputs, inputs, strict=True)]
print(json.dumps({"seconds": time.perf_counter() - start}))
"""

AUTOROUND = """
import json, sys, time
import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = load_file(sys.argv[4])["ids"]
model = AutoModelForCausalLM.from_pretrained(sys.argv[3], dtype=torch.float32)
start = time.perf_counter()
AutoRound(
    model, AutoTokenizer.from_pretrained(sys.argv[3]), scheme="W4A16", bits=4, group_size=64, sym=True, iters=200,
    nsamples=len(ids), seqlen=ids.shape[1], dataset=[{"input_ids": row[None]} for row in ids], device_map="cpu",
).quantize()
print(json.dumps({"seconds": time.perf_counter() - start}))
"""


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
                python, script, peer = {
                    "alps": (sys.executable, ALPS, "alps.py as published"),
                    "tuned": (args.autoround, AUTOROUND, "auto-round"),
                }.get(job, (args.peer, PEER, "llm-compressor"))
                for _ in range(args.rounds if model == args.model else 1):
                    arguments = (job, model, str(scratch / "ids.safetensors"), str(args.alps))
                    pairs.append((seconds(sys.executable, OURS, *arguments), seconds(python, script, *arguments)))
                ours, theirs = (" ".join(f"{pair[i]:.1f}" for pair in pairs) for i in (0, 1))
                ratio = statistics.median(a / b for a, b in pairs)
                rows.append([Path(model).name, job, ours, peer, theirs, f"{ratio:.2f}"])
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
