"""Loss beside time for each effort: `make bench-effort [MODEL= TRAIN= HELDOUT= ARGS=]`, a section of docs/benchmarks.md.

For each job and effort: the scores of benchmarks/scoring.py, and CPU seconds of the whole call, from the folder to the written
checkpoint. The ratio is to `fast` of the same job, in the same process. TRAIN is text, or token ids
(``file.safetensors:name``). A shared machine slows all alike, more or less: read the ratios.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page, scoring  # noqa: E402
from compress.passes.effort import EFFORTS  # noqa: E402

#: Passes and what they are asked for, by job.
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("cast", {"weights": "int4"}),
    "int3": ("cast", {"weights": "int3"}),
    "50%": ("prune_unstructured", {"sparsity": 0.5}),
    "60%": ("prune_unstructured", {"sparsity": 0.6}),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--train", default=str(ROOT / "examples/text/train.txt"))
    scoring.options(parser)
    parser.add_argument("--jobs", nargs="+", default=["int4", "int3", "50%"], choices=list(JOBS))
    parser.add_argument(
        "--efforts", nargs="+", default=list(EFFORTS), choices=EFFORTS, help="the first one is compared to"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--store", choices=["stock", "compact"], default="stock", help="GPT-2's codes need compact")
    parser.add_argument("--section", default="effort", help="of docs/benchmarks.md; '-' prints only")
    args = parser.parse_args()
    import compress

    texts = scoring.held_out(args)
    data = scoring.calibration(args.train, args.samples)
    rows: list[list[str]] = []
    scratch = Path(tempfile.mkdtemp(prefix="compress-bench-"))
    try:
        # once, for what is imported and cached
        compress.apply("cast", args.model, scratch / "out", store=args.store, weights="int4", method="rtn")
        for job in args.jobs:
            name, settings = JOBS[job]
            first = 0.0
            for effort in args.efforts:
                shutil.rmtree(scratch, ignore_errors=True)
                start = time.process_time()
                compress.apply(name, args.model, scratch / "out", store=args.store, effort=effort, **data, **settings)
                seconds = time.process_time() - start
                first = first or seconds
                cells = texts.cells([texts.score(scratch / "out")])
                rows.append([job, effort, *cells, f"{seconds:.1f}", f"{seconds / first:.2f}"])
                print(*rows[-1], flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    table = [
        f"## What an effort costs and gains: {page.model_name(args.model)}",
        "",
        f"`{page.command('bench-effort', parser, args)}`: {page.environment()} "
        f"{args.samples} × {scoring.WINDOW} calibration tokens. {texts.note()} "
        f"Integers are symmetric, in groups of 64. CPU seconds cover the whole call; the ratio is to `{args.efforts[0]}`.",
        "",
        *page.table(["job", "effort", *scoring.COLUMNS, "CPU seconds", "ratio"], rows),
    ]
    page.deliver(args.section, table)


if __name__ == "__main__":
    main()
