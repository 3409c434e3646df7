"""Predicted and taken time of whole runs: `make bench-minutes [MODEL= TRAIN= HELDOUT= ARGS=]`, a section of docs/benchmarks.md.

For each job a recipe is planned at this machine's rates, which are measured first, and then run as `compress run` in a process
of its own. With one thread (OMP_NUM_THREADS=1) both count CPU seconds, so other work on the machine changes little.

What is done is kept in --results; the same command goes on there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page  # noqa: E402

#: Job ▶ its pass and settings.
JOBS: dict[str, dict[str, Any]] = {
    "int4, GPTQ alone": {"cast": {"weights": "int4", "error_correction": [], "reconstruction_epochs": 0}},
    "int4": {"cast": {"weights": "int4"}},
    "50 %, SparseGPT alone": {
        "prune_unstructured": {"sparsity": "50%", "method": "sparsegpt", "reconstruction_epochs": 0}
    },
    "50 %": {"prune_unstructured": {"sparsity": "50%"}},
    "25 % of the neurons": {"prune_structured": {"mlp": "25%"}},
    "a KV head": {"prune_structured": {"heads": "GROUP"}},
    "a block": {"prune_structured": {"layers": 1}},
    "two blocks, no repair": {"prune_structured": {"layers": 2, "compensation": "none"}},
    "70 % in factors": {"factorize": {"keep_parameters": "70%"}},
    "two blocks share": {"share": {"groups": [[1, 2]]}},
    "distillation": {"distill": {"tokens": "TOKENS"}},
    "int8, evaluated": {"cast": {"weights": "int8", "method": "rtn"}},
}
#: Bytes of text that calibration reads, and that evaluation reads.
TEXT, HELD_OUT = 1 << 21, 1 << 18


def recipe(job: str, model: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The recipe of a job, as a mapping."""
    from compress.architectures.model_map import model_map
    from compress.checkpoint.open import open_headers

    mapped = model_map(open_headers(model)[0])
    ((name, settings),) = JOBS[job].items()
    values = {"GROUP": mapped.heads // mapped.kv_heads, "TOKENS": args.tokens}
    settings = {k: values.get(v, v) if isinstance(v, str) else v for k, v in settings.items()}
    data: dict[str, Any] = {"calibration": {"files": [f"{folder}/train.txt"], "samples": args.samples, "length": 256}}
    if name == "distill":
        data = {"training": {"files": [f"{folder}/train.txt"], "length": 256}}
    if job.endswith("evaluated"):
        data = {"evaluation": {"files": [f"{folder}/heldout.txt"]}}
    metrics = ["bits_per_byte", "kl"] if "evaluation" in data else []
    # a distillation towards the model itself computes all that any other does
    return {
        "model": model,
        "output": f"{folder}/out",
        "store": "compact",
        "device": "cpu",
        "data": data,
        "passes": [{name: settings | ({"allow_noop": True} if name == "distill" else {})}],
        "evaluate": metrics,
    }


def predicted(planned: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Seconds that a plan tells by part, and their sum."""
    parts = {key: value for key, value in planned["seconds"].items() if value}
    parts |= {row["name"]: row["seconds"] for stage in planned["stages"] for row in stage["passes"]}
    return parts, sum(parts.values())


def measured(job: str, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Predicted and taken seconds of a job."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, source, size in (("train", args.train, TEXT), ("heldout", args.heldout[0], HELD_OUT)):
            text = Path(source).read_bytes()[:size].decode(errors="ignore")
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        file = folder / "recipe.json"
        file.write_text(json.dumps(recipe(job, model, folder, args)))
        compress = [sys.executable, "-m", "compress"]
        planned = subprocess.run([*compress, "plan", str(file), "--json"], check=True, capture_output=True, text=True)
        parts, total = predicted(json.loads(planned.stdout))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*compress, "run", str(file), "--quiet"], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode not in (0, 3):
            raise SystemExit(f"{job}: {done.stderr}")
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"parts": parts, "predicted": total, "taken": taken}


def cut(model: str, blocks: int, place: Path) -> str:
    """The model with its first blocks only; all with 0."""
    import compress
    from compress.architectures.model_map import model_map
    from compress.checkpoint.open import open_headers

    if not blocks:
        return model
    folder = place / f"{Path(model).name}-{blocks}"
    if not folder.exists():
        gone = list(range(blocks, model_map(open_headers(model)[0]).depth))
        compress.apply("prune_structured", model, folder, layers=gone, compensation="none", importance="magnitude")
    return str(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--train", default=str(ROOT / "examples/text/train.txt"))
    parser.add_argument("--heldout", nargs="+", default=[str(ROOT / "examples/text/test.txt")])
    parser.add_argument("--blocks", type=int, default=0, help="cut the model to its first blocks; 0 for all")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100_000, help="of the distillation")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--results", type=Path, default=ROOT / "out/bench-minutes")
    parser.add_argument("--section", default="minutes", help="of docs/benchmarks.md; '-' prints only")
    args = parser.parse_args()
    results = args.results / f"{Path(args.model).name}-{args.blocks}"
    results.mkdir(parents=True, exist_ok=True)
    model = cut(str(Path(args.model).absolute()), args.blocks, results)
    rates(results)
    rows = []
    for job in args.jobs:
        file = results / f"{job}.json"
        if not file.exists():
            file.write_text(json.dumps(measured(job, model, args)))
            print(job, file.read_text(), flush=True)
        row = json.loads(file.read_text())
        ratio = row["predicted"] / row["taken"]
        rows.append([job, f"{row['predicted']:.0f}", f"{row['taken']:.0f}", f"{ratio:.2f}"])
    some = f"the first {args.blocks} blocks of " if args.blocks else ""
    page.deliver(
        args.section,
        [
            f"## Predicted time, {some}{page.model_name(args.model)}",
            "",
            f"`{page.command('bench-minutes', parser, args)}`: {page.environment()} CPU seconds of whole runs of "
            f"`compress run`, with {os.environ.get('OMP_NUM_THREADS') or 'all'} threads, and those that `compress plan` "
            f"predicts. {args.samples} × 256 calibration tokens.",
            "",
            *page.table(["job", "predicted", "taken", "ratio"], rows),
        ],
    )
    shutil.rmtree(results / Path(model).name, ignore_errors=True)


def rates(results: Path) -> None:
    """Measure this machine once, into a cache of the results' own, which the plans read."""
    from compress.blockwise.rates import measure_rates
    from compress.progress import SilentProgress
    from compress.work import cached_rates, keep_rates

    os.environ["XDG_CACHE_HOME"] = str(results.absolute() / "cache")
    if cached_rates() is None:
        keep_rates(measure_rates(SilentProgress()))


if __name__ == "__main__":
    main()
