"""Speed and memory, side by side in one run: `make bench` writes docs/benchmarks.md.

Checkpoints of a Llama shape with random weights are made in a scratch folder (BENCH_DIR, else the system's), cast from
fp32 to bf16 by `compress`, by `cp` + fsync (the same bytes read), and by transformers' from_pretrained + save_pretrained, in
turns, each in a process of its own. With --section rounding: rounding to integers beside the cast to bf16, of a checkpoint
that is nearly all matrices, in CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page  # noqa: E402

SIZES_GB = (2, 6)
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))

MAKE = """
import sys, torch, transformers
from pathlib import Path
sys.path.insert(0, {root!r})
from compress.checkpoint.headers import Entry, render_header
import json, os
folder, gigabytes, vocabulary = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
hidden, inner = 2048, 5632
block = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
layers = round((gigabytes * 1e9 / 4 - 2 * vocabulary * hidden) / block)
config = transformers.LlamaConfig(
    vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=16,
    num_key_value_heads=16, dtype="float32", architectures=["LlamaForCausalLM"])
folder.mkdir(parents=True)
config.save_pretrained(folder)
with torch.device("meta"):
    shapes = {{k: tuple(v.shape) for k, v in transformers.LlamaForCausalLM(config).state_dict().items()}}
limit, groups, size = 1 << 30, [[]], 0
for name, shape in shapes.items():
    count = 4 * torch.Size(shape).numel()
    if size + count > limit:
        groups.append([]); size = 0
    groups[-1].append(name); size += count
names = {{}}
torch.manual_seed(0)
for i, group in enumerate(groups, 1):
    file = f"model-{{i:05}}-of-{{len(groups):05}}.safetensors"
    entries, position = {{}}, 0
    for name in group:
        end = position + 4 * torch.Size(shapes[name]).numel()
        entries[name] = Entry("F32", shapes[name], position, end); position = end
    with open(folder / file, "wb") as out:
        out.write(render_header(entries, {{"format": "pt"}}))
        for name in group:
            out.write(memoryview((torch.randn(shapes[name]) * 0.02).numpy()).cast("B"))
        out.flush(); os.fsync(out.fileno())
    names |= dict.fromkeys(group, file)
(folder / "model.safetensors.index.json").write_text(json.dumps({{"metadata": {{}}, "weight_map": names}}))
"""

CAST = """
import json, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
start = time.perf_counter()
from compress import passes
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.write import write_checkpoint
from compress.passes.base import Context
from compress.progress import SilentProgress
import torch
before = time.process_time()
checkpoint = open_checkpoint(sys.argv[1])
cast = passes.get("cast")
settings = json.loads(sys.argv[3])
context = Context(checkpoint, "cpu", "float32", 0, None, lambda name: None, SilentProgress(), Path("."))
result = cast.apply(checkpoint, cast.settings(**settings), context)
written = write_checkpoint(result, Path(sys.argv[2]))
total, cpu = time.perf_counter() - start, time.process_time() - before
print(json.dumps({{"seconds": total - written.verify_seconds, "verify": written.verify_seconds, "cpu": cpu}}))
"""

STOCK = """
import json, sys, time
start = time.perf_counter()
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
import os
for name in os.listdir(sys.argv[2]):
    descriptor = os.open(os.path.join(sys.argv[2], name), os.O_RDONLY); os.fsync(descriptor); os.close(descriptor)
print(json.dumps({{"seconds": time.perf_counter() - start}}))
"""

COPY = """
import json, os, subprocess, sys, time
start = time.perf_counter()
subprocess.run(["cp", "-r", sys.argv[1], sys.argv[2]], check=True)
for name in os.listdir(sys.argv[2]):
    descriptor = os.open(os.path.join(sys.argv[2], name), os.O_RDONLY); os.fsync(descriptor); os.close(descriptor)
print(json.dumps({{"seconds": time.perf_counter() - start}}))
"""


def python(code: str, *arguments: object) -> tuple[str, int, float]:
    """Run code in a process; stdout, peak resident bytes, CPU seconds."""
    process = subprocess.Popen(
        [sys.executable, "-c", code.format(root=str(ROOT)), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    output, errors = process.stdout.read(), process.stderr.read()  # type: ignore[union-attr]
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(errors)
    return output, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), usage.ru_utime + usage.ru_stime


def streaming(scratch: Path) -> list[str]:
    """The cast of sharded checkpoints of two sizes, beside `cp` and stock transformers."""
    figures: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for size in SIZES_GB:
        python(MAKE, scratch / f"in{size}", size, 32000)
    contenders = {"compress": CAST, "cp": COPY, "stock": STOCK}
    for turn in range(ROUNDS):
        for size in SIZES_GB:
            for name, code in contenders.items():
                if name == "stock" and size != SIZES_GB[0]:
                    continue
                out = scratch / "out"
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
                text, peak, _ = python(code, scratch / f"in{size}", out, '{"weights": "bf16"}')
                data = json.loads(text.splitlines()[-1])
                figures.setdefault(f"{name}{size}", []).append(data["seconds"])
                if "verify" in data:
                    figures.setdefault(f"verify{size}", []).append(data["verify"])
                peaks[f"{name}{size}"] = max(peak, peaks.get(f"{name}{size}", 0))
                print(
                    f"round {turn + 1}: {name} {size} GB: {data['seconds']:.1f} s, peak {peak / 2**20:.0f} MiB",
                    flush=True,
                )
    median = {key: statistics.median(values) for key, values in figures.items()}
    small, large = SIZES_GB
    ours, copied = median[f"compress{large}"] - median[f"compress{small}"], median[f"cp{large}"] - median[f"cp{small}"]
    rows = [
        "### fp32 to bf16 cast of a sharded checkpoint",
        "",
        f"Random-weight Llama shape (hidden 2048), shards of 1 GiB, median of {ROUNDS} rounds taken in turns.",
        "",
        "| job | seconds | of it verification | peak resident MiB |",
        "|---|---|---|---|",
    ]
    for key, label in (
        (f"compress{small}", f"compress cast, {small} GB"),
        (f"compress{large}", f"compress cast, {large} GB"),
        (f"cp{small}", f"cp + fsync, {small} GB"),
        (f"cp{large}", f"cp + fsync, {large} GB"),
        (f"stock{small}", f"from_pretrained(dtype=bfloat16) + save_pretrained + fsync, {small} GB"),
    ):
        verify = median.get(key.replace("compress", "verify")) if key.startswith("compress") else None
        total = median[key] + (verify or 0)
        rows.append(
            f"| {label} | {total:.1f} | {f'{verify:.1f}' if verify is not None else '–'} | {peaks[key] / 2**20:.0f} |"
        )
    whole = median[f"compress{small}"] + median[f"verify{small}"]
    rows += [
        "",
        f"- Time per byte: ({large} GB − {small} GB) without verification {ours:.1f} s, `cp` + fsync {copied:.1f} s: "
        f"**{ours / copied:.2f} ×** (bound 1.5 ×); with verification "
        f"{(ours + median[f'verify{large}'] - median[f'verify{small}']) / copied:.2f} ×.",
        f"- The whole {small} GB run, verification and start-up included, against stock: "
        f"**{whole / median[f'stock{small}']:.2f} ×** (bound 1 ×).",
        f"- Peak resident memory: {peaks[f'compress{small}'] / 2**20:.0f} MiB at {small} GB, "
        f"{peaks[f'compress{large}'] / 2**20:.0f} MiB at {large} GB (bound 1024, and the same); "
        f"stock {peaks[f'stock{small}'] / 2**20:.0f} MiB at {small} GB.",
        "",
    ]
    return rows


def rounding(scratch: Path) -> list[str]:
    """Rounding to nearest beside the cast to bf16, in CPU seconds, which other work on the machine hardly changes."""
    python(MAKE, scratch / "in", 1, 2000)
    jobs: dict[str, dict[str, str]] = {"bf16": {"weights": "bf16"}}
    jobs |= {f"{f} rtn": {"weights": f, "method": "rtn"} for f in ("int8", "int4", "int3")}
    seconds: dict[str, list[float]] = {job: [] for job in jobs}
    peaks = dict.fromkeys(jobs, 0)
    for _ in range(ROUNDS):
        for job, settings in jobs.items():
            shutil.rmtree(scratch / "out", ignore_errors=True)
            text, peak, _ = python(CAST, scratch / "in", scratch / "out", json.dumps(settings))
            seconds[job].append(json.loads(text.splitlines()[-1])["cpu"])
            peaks[job] = max(peak, peaks[job])
            print(f"{job}: {seconds[job][-1]:.1f} s", flush=True)
    median = {job: statistics.median(values) for job, values in seconds.items()}
    table = [
        [job, f"{median[job]:.1f}", f"{median[job] / median['bf16']:.2f} ×", f"{peaks[job] / 2**20:.0f}"]
        for job in jobs
    ]
    return [
        "## Rounding a stream of weights",
        "",
        f"`python benchmarks/run.py --section rounding`: {page.environment()} 1 GB of random float32 weights of a Llama shape "
        f"(hidden 2048, vocabulary 2,000); reading, writing and verification; median of {ROUNDS} rounds in "
        "turns (bound 2 ×).",
        "",
        *page.table(["job", "CPU seconds", "beside bf16", "peak resident MiB"], table),
    ]


def main() -> None:
    """Run a section and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--section", default="speed", choices=["speed", "rounding"])
    section = parser.parse_args().section
    scratch = Path(tempfile.mkdtemp(prefix="compress-bench-", dir=os.environ.get("BENCH_DIR")))
    try:
        if section == "speed":
            rows = [
                "## Casting a stream of weights",
                "",
                f"`make bench`: {page.environment()}",
                "",
                *streaming(scratch),
            ]
        else:
            rows = rounding(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    page.put(section, rows)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
