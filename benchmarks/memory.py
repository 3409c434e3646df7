"""Memory of a calibrated pass on a large shape: `make bench-memory` writes a section of docs/benchmarks.md.

Random bf16 checkpoints of the shape of a 7B Llama, cut to few blocks, are pruned by SparseGPT with 32 x 512 tokens,
each in a process of its own whose peak resident memory is read; beside it stands what the plan says, also for all 32 blocks.
With --section memory-structured they lose a quarter of MLP and heads, repaired by least squares, with 8 x 512 tokens; with
--section memory-cast a smaller shape is cast to int4, and to formats within a budget, with 4 x 512 tokens.
--section memory-plan runs nothing: what plans say of every pass's defaults, for whole models of 7B, 8B and 70B parameters.
--section memory-block runs passes on one block of the shapes of 7B and 70B.
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
from compress.passes.effort import EFFORTS  # noqa: E402

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}

#: Blocks, and config fields, of what is planned.
WHOLE: dict[str, tuple[int, dict[str, int]]] = {
    "Llama 7B": (32, SHAPE),
    "Llama 3 8B": (
        32,
        {**SHAPE, "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
    ),
    "Llama 3 70B": (
        80,
        {
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
}
#: Passes as recipes name them; each with every effort that it has.
PLANNED: list[dict[str, Any]] = [
    {"cast": {"weights": "int8", "method": "rtn"}},
    *({"cast": {"weights": "int4", "effort": effort}} for effort in EFFORTS),
    {"cast": {"bits": 4.5}},
    {"cast": {"weights": "trellis2"}},
    *({"prune_unstructured": {"sparsity": 0.5, "effort": effort}} for effort in EFFORTS),
    {"prune_unstructured": {"pattern": "2:4"}},
    {"prune_structured": {"mlp": "25%"}},
    {"prune_structured": {"heads": "25%"}},
    {"prune_structured": {"layers": 2}},
    {"factorize": {"keep_parameters": 0.7}},
    {"share": {"groups": 2}},
    {"latent_attention": {"max_cache": "50%"}},
    {"carve_experts": {"experts": 8, "active": "50%"}},
]

#: Shape ▶ passes that are run on one block of it.
BLOCKS: dict[str, list[dict[str, Any]]] = {
    "Llama 7B": [
        {"cast": {"weights": "int4", "effort": "fast"}},
        {"cast": {"weights": "int4"}},
        {"prune_unstructured": {"sparsity": 0.5}},
        {"prune_structured": {"mlp": "25%"}},
        {"factorize": {"keep_parameters": 0.7}},
    ],
    "Llama 3 70B": [{"cast": {"weights": "int4", "effort": "fast"}}],
}

SMALL = {
    "vocab_size": 4000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}

SPARSEGPT = {"prune_unstructured": {"method": "sparsegpt", "sparsity": 0.5, "reconstruction_epochs": 0}}
NARROWER = {"prune_structured": {"mlp": "25%", "heads": "25%", "compensation": "least_squares"}}
CASTS: dict[str, dict[str, Any]] = {"int4": {"weights": "int4"}, "4.5 bits": {"bits": 4.5}}

RUN = """
import json, sys, time
sys.path.insert(0, {root!r})
start = time.perf_counter()
import compress
compress.run(json.loads(sys.argv[1]))
print(json.dumps({{"seconds": time.perf_counter() - start}}))
"""


def recipe(folder: Path, ids: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """One pass, within 4 GiB."""
    return {
        "model": str(folder),
        "output": str(folder.parent / "out"),
        "max_ram": "4GiB",
        "data": {"calibration": {"files": [str(ids)]}},
        "passes": [entry],
    }


def make(folder: Path, shape: dict[str, int], layers: int, *, weights: bool = True) -> None:
    """A sharded bf16 checkpoint of that many blocks, written tensor by tensor; or its headers alone, as sparse files."""
    import torch
    import transformers

    from compress.checkpoint.layout import lay_out
    from compress.spec.spec import Spec, Structure, Tensor

    config = transformers.LlamaConfig(
        **shape, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"]
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


def measured(
    scratch: Path, shape: dict[str, int], layers: int, samples: int, entry: dict[str, Any], max_ram: str | None = "4GiB"
) -> list[str]:
    """Peak resident MiB of a pass on so many blocks, what the plan says, and seconds."""
    import torch
    from safetensors.torch import save_file

    import compress

    ids, folder = scratch / "ids.safetensors", scratch / "in"
    generator = torch.Generator().manual_seed(0)
    save_file({"ids": torch.randint(0, shape["vocab_size"], (samples, 512), generator=generator)}, ids)
    make(folder, shape, layers)
    asked = {**recipe(folder, ids, entry), "max_ram": max_ram}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN.format(root=str(ROOT)), json.dumps(asked)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed with status {status}")
    seconds, promised = json.loads(output.splitlines()[-1])["seconds"], compress.plan(asked).peak_memory
    for path in (folder, scratch / "out", scratch / "out.run"):
        shutil.rmtree(path)
    return [f"{usage.ru_maxrss / 1024:.0f}", f"{promised / 2**20:.0f}", f"{seconds:.0f}"]


def large(scratch: Path, layers: list[int], entry: dict[str, Any], samples: int) -> list[list[str]]:
    """A pass on the shape of a 7B Llama, with few blocks and, planned alone, with all."""
    import compress

    rows = []
    for count in layers:
        rows.append([str(count), *measured(scratch, SHAPE, count, samples, entry)])
        print(*rows[-1], flush=True)
    make(scratch / "in32", SHAPE, 32, weights=False)
    whole = compress.plan(recipe(scratch / "in32", scratch / "ids.safetensors", entry)).peak_memory
    rows.append(["32", "not run", f"{whole / 2**20:.0f}", ""])
    return page.table(["blocks", "peak resident MiB", "planned MiB", "seconds"], rows)


def pruning(scratch: Path, layers: list[int]) -> list[str]:
    """SparseGPT on the shape of a 7B Llama."""
    return [
        "## Memory of a calibrated pass",
        "",
        f"`make bench-memory`: {page.environment()} SparseGPT, 50 %, 32 × 512 tokens, on random bf16 weights of a 7B Llama's "
        "shape, with `max_ram: 4GiB`; peak resident memory of the whole process, with verification of the output.",
        "",
        *large(scratch, layers, SPARSEGPT, 32),
    ]


def narrowing(scratch: Path, layers: list[int]) -> list[str]:
    """A quarter of neurons and heads of the shape of a 7B Llama."""
    return [
        "## Memory of structured pruning",
        "",
        f'`make bench-memory ARGS="--section memory-structured"`: {page.environment()} A quarter of MLP and heads, by OBS, '
        "least squares, no reconstruction, 8 × 512 tokens, on random bf16 weights of a 7B Llama's shape, with `max_ram: 4GiB`; "
        "peak resident memory of the whole process, with verification of the output.",
        "",
        *large(scratch, layers, NARROWER, 8),
    ]


def casting(scratch: Path) -> list[str]:
    """Casts of a smaller shape."""
    rows = []
    for job, settings in CASTS.items():
        rows.append([job, *measured(scratch, SMALL, 2, 4, {"cast": settings})])
        print(*rows[-1], flush=True)
    return [
        "## Memory of a calibrated cast",
        "",
        f'`make bench-memory ARGS="--section memory-cast"`: {page.environment()} The defaults with that format, 4 × 512 '
        "tokens, on random bf16 weights of a Llama of two blocks (hidden 1024, MLP 2816); peak resident memory of the whole "
        "process.",
        "",
        *page.table(["cast", "peak resident MiB", "planned MiB", "seconds"], rows),
    ]


def blocks(scratch: Path, jobs: list[str], shapes: list[str]) -> list[str]:
    """Passes on one block of large shapes; `jobs` are names of passes, all where it is empty."""
    rows = []
    for shape in shapes:
        for entry in BLOCKS[shape]:
            ((name, settings),) = entry.items()
            if jobs and name not in jobs:
                continue
            said = ", ".join(f"{key}: {value}" for key, value in settings.items())
            rows.append(
                [
                    shape,
                    f"`{name}`",
                    said,
                    *measured(scratch, WHOLE[shape][1], 1, 4, entry, max_ram="4GiB" if shape == "Llama 7B" else None),
                ]
            )
            print(*rows[-1], flush=True)
    return [
        "## Memory of one block",
        "",
        f'`make bench-memory ARGS="--section memory-block"`: {page.environment()} Models of one block with random bf16 '
        "weights, 4 × 512 tokens, the smaller one with `max_ram: 4GiB`; peak resident memory of the whole process.",
        "",
        *page.table(["shape of", "pass", "settings", "peak resident MiB", "planned MiB", "seconds"], rows),
    ]


def planned(scratch: Path) -> list[str]:
    """Peak memory by plan, of every pass and whole model."""
    import torch
    from safetensors.torch import save_file

    import compress
    from compress.errors import CompressError

    ids = scratch / "ids.safetensors"
    save_file({"ids": torch.zeros(128, 512, dtype=torch.int64)}, ids)
    folders = {}
    for name, (layers, shape) in WHOLE.items():
        folders[name] = scratch / name.replace(" ", "-")
        make(folders[name], shape, layers, weights=False)
    rows = []
    for entry in PLANNED:
        ((name, settings),) = entry.items()
        cells = []
        for folder in folders.values():
            asked = {**recipe(folder, ids, entry), "store": "compact"}
            del asked["max_ram"]
            try:
                cells.append(f"{compress.plan(asked).peak_memory / 2**20:,.0f}")
            except CompressError as error:
                print(name, settings, error)
                cells.append("refused")
        rows.append([f"`{name}`", ", ".join(f"{key}: {value}" for key, value in settings.items()), *cells])
        print(*rows[-1], flush=True)
    return [
        "## Memory by plan",
        "",
        '`make bench-memory ARGS="--section memory-plan"`: peak resident MiB of each pass on a CPU, as `compress plan` says, '
        "bf16 weights, 128 × 512 calibration tokens. Nothing was run.",
        "",
        *page.table(["pass", "settings", *folders], rows),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument(
        "--section",
        default="memory",
        choices=["memory", "memory-structured", "memory-cast", "memory-plan", "memory-block"],
    )
    parser.add_argument("--jobs", nargs="*", default=[], help="passes of memory-block")
    parser.add_argument("--shapes", nargs="+", default=list(BLOCKS), choices=list(BLOCKS), help="of memory-block")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="compress-bench-", dir=os.environ.get("BENCH_DIR")))
    try:
        if args.section == "memory-plan":
            rows = planned(scratch)
        elif args.section == "memory-block":
            rows = blocks(scratch, args.jobs, args.shapes)
        elif args.section == "memory-cast":
            rows = casting(scratch)
        else:
            rows = (pruning if args.section == "memory" else narrowing)(scratch, args.layers)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    page.put(args.section, rows)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
