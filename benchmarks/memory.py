"""Memory of a calibrated pass on a large shape: `make bench-memory` writes a section of docs/benchmarks.md.

Random bf16 checkpoints of the shape of a 7B Llama, cut to few blocks, are pruned by SparseGPT with 32 x 512 tokens,
each in a process of its own whose peak resident memory is read; beside it stands what the plan says, also for all 32 blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page  # noqa: E402

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}

PRUNE = """
import json, sys, time
sys.path.insert(0, {root!r})
start = time.perf_counter()
import compress
compress.run(json.loads(sys.argv[1]))
print(json.dumps({{"seconds": time.perf_counter() - start}}))
"""


def recipe(folder: Path, ids: Path) -> dict[str, Any]:
    """SparseGPT at 50 %, within 4 GiB."""
    return {
        "model": str(folder),
        "output": str(folder.parent / "out"),
        "max_ram": "4GiB",
        "data": {"calibration": {"files": [str(ids)]}},
        "passes": [{"prune_unstructured": {"method": "sparsegpt", "sparsity": 0.5, "tune_epochs": 0}}],
    }


def make(folder: Path, layers: int, *, weights: bool = True) -> None:
    """A sharded bf16 checkpoint of that many blocks, written tensor by tensor; or its headers alone, as sparse files."""
    import torch
    import transformers

    from compress.checkpoint.layout import lay_out
    from compress.checkpoint.spec import Spec, Structure, Tensor

    config = transformers.LlamaConfig(
        **SHAPE, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in transformers.LlamaForCausalLM(config).state_dict().items()}
    spec = Spec(Structure(config.to_dict()), {k: Tensor(k, v, "BF16") for k, v in shapes.items()})
    layout = lay_out(spec, 10**9)
    torch.manual_seed(0)
    for shard in layout.shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            if not weights:
                file.truncate(shard.bytes)
                continue
            for name, entry in shard.entries.items():
                values = torch.ones(entry.shape) if "norm" in name else torch.randn(entry.shape) * 0.02
                file.write(memoryview(values.bfloat16().view(torch.uint8).numpy()).cast("B"))
    index = layout.index()
    if index is not None:
        (folder / "model.safetensors.index.json").write_bytes(index)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="compress-bench-", dir=os.environ.get("BENCH_DIR")))
    rows = [
        "## Memory of a calibrated pass",
        "",
        f"`make bench-memory`: {page.environment()} SparseGPT, 50 %, 32 × 512 tokens, on random bf16 weights of a 7B Llama's "
        "shape, with `max_ram: 4GiB`; peak resident memory of the whole process, verification of the output included.",
        "",
        "| blocks | peak resident MiB | planned MiB | seconds |",
        "|---|---|---|---|",
    ]
    try:
        import torch
        from safetensors.torch import save_file

        import compress

        ids = scratch / "ids.safetensors"
        save_file({"ids": torch.randint(0, 32000, (32, 512), generator=torch.Generator().manual_seed(0))}, ids)
        for layers in args.layers:
            folder = scratch / f"in{layers}"
            make(folder, layers)
            process = subprocess.Popen(
                [sys.executable, "-c", PRUNE.format(root=str(ROOT)), json.dumps(recipe(folder, ids))],
                stdout=subprocess.PIPE,
                text=True,
            )
            assert process.stdout is not None
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"failed with status {status}")
            seconds = json.loads(output.splitlines()[-1])["seconds"]
            promised = compress.plan(recipe(folder, ids)).peak_memory
            rows.append(f"| {layers} | {usage.ru_maxrss / 1024:.0f} | {promised / 2**20:.0f} | {seconds:.0f} |")
            print(rows[-1], flush=True)
            for path in (folder, scratch / "out", scratch / "out.run"):
                shutil.rmtree(path)
        make(scratch / "in32", 32, weights=False)
        rows.append(f"| 32 | not run | {compress.plan(recipe(scratch / 'in32', ids)).peak_memory / 2**20:.0f} | |")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    page.put("memory", rows)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
