"""Held-out loss after casting to few bits: `make bench-cast [MODEL= TRAIN= HELDOUT=]`, as `make bench-prune`.

Arguments are those of benchmarks/prune.py, scores those of benchmarks/scoring.py, bytes those of the weight files as written.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page, scoring  # noqa: E402

UNTUNED: dict[str, Any] = {"effort": "best", "reconstruction_epochs": 0}
JOBS: dict[str, dict[str, Any]] = {
    "int8 default": {"weights": "int8"},
    "int4 rtn": {"weights": "int4", "method": "rtn"},
    "int4 mse": {"weights": "int4", "method": "mse"},
    "int4 untuned": {"weights": "int4", **UNTUNED},
    "int4 balanced": {"weights": "int4"},
    "int4 tuned": {"weights": "int4", "reconstruction_epochs": 1},
    "int4 best": {"weights": "int4", "effort": "best"},
    "int3 rtn": {"weights": "int3", "method": "rtn"},
    "int3 mse": {"weights": "int3", "method": "mse"},
    "int3 untuned": {"weights": "int3", **UNTUNED},
    "int3 balanced": {"weights": "int3"},
    "int3 tuned": {"weights": "int3", "reconstruction_epochs": 1},
    "int3 best": {"weights": "int3", "effort": "best"},
    "int2 balanced": {"weights": "int2"},
    "int2 best": {"weights": "int2", "effort": "best"},
    "trellis2 rtn": {"weights": "trellis2", "method": "rtn"},
    "trellis2 balanced": {"weights": "trellis2"},
    "trellis2 best": {"weights": "trellis2", "effort": "best"},
    "trellis3 best": {"weights": "trellis3", "effort": "best"},
    "trellis4 best": {"weights": "trellis4", "effort": "best"},
    "3.5 bits": {"bits": 3.5},
    "4 bits": {"bits": 4},
    "50% sparse + int4": {"weights": "int4"},
}
#: Other tools' method beside ours; None for all.
PEERS: dict[str, str | None] = {"best": None, "balanced": None, "tuned": None, "untuned": "gptq"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument(
        "--train",
        nargs="+",
        default=[str(ROOT / "examples/text/train.txt")],
        help="the best of int4 and int3 run with each",
    )
    scoring.options(parser)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--store", choices=["stock", "compact"], default="stock", help="GPT-2's codes need compact")
    parser.add_argument("--section", default="cast", help="of docs/benchmarks.md; '-' prints only")
    args = parser.parse_args()
    import compress

    texts = scoring.held_out(args)
    rows = []
    scratch = Path(tempfile.mkdtemp(prefix="compress-bench-"))
    try:
        for job in args.jobs:
            draws, seconds, size = [], [], 0
            for train in args.train if job in ("int4 best", "int3 best") else args.train[:1]:
                shutil.rmtree(scratch, ignore_errors=True)
                data = scoring.calibration(train, args.samples)
                start, source, store = time.perf_counter(), args.model, args.store
                if job.startswith("50%"):
                    source, store = scratch / "half", "compact"
                    compress.apply("prune_unstructured", args.model, source, store=store, sparsity=0.5, **data)
                compress.apply("cast", source, scratch / "out", store=store, **data, **JOBS[job])
                seconds.append(time.perf_counter() - start)
                size = sum(f.stat().st_size for f in (scratch / "out").glob("*.safetensors"))
                draws.append(texts.score(scratch / "out"))
            rows.append([job, *texts.cells(draws), f"{size:,}", f"{statistics.mean(seconds):.1f}"])
            amount, _, way = job.partition(" ")
            rows[-1].append(page.others(args.model, amount, PEERS.get(way, way)))
            print(*rows[-1], flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    table = [
        f"## Casting {page.model_name(args.model)}",
        "",
        f"`{page.command('bench-cast', parser, args)}`: {page.environment()} "
        f"{args.samples} × {scoring.WINDOW} calibration tokens. {texts.note()} "
        "Integers are symmetric, in groups of 64 (int8: per channel). `best` is `effort: best`: GPTQ with "
        "every error correction, then block reconstruction; `untuned` omits the reconstruction, `tuned` adds one epoch of it "
        "to `balanced`. Seconds cover the whole call: loading, self-check and writing.",
        "",
        *page.table(["job", *scoring.COLUMNS, "bytes", "seconds", "others, ΔNLL"], rows),
    ]
    page.deliver(args.section, table)


if __name__ == "__main__":
    main()
