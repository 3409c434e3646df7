"""Held-out loss after pruning: `make bench-prune [MODEL= TRAIN= HELDOUT=]` writes a section of docs/benchmarks.md.

For each method and sparsity: the scores of benchmarks/scoring.py, the mean relative error of the layers, seconds.
TRAIN is text, or token ids (``file.safetensors:name``). Figures of other tools (`benchmarks.peers`) stand beside ours, those of
a method beside that method's and all beside the best's.
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

AMOUNTS: dict[str, dict[str, Any]] = {
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
    "70%": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda", "reconstruction_epochs": 0},
    "sparsegpt": {"method": "sparsegpt", "reconstruction_epochs": 0},
    "alps": {"method": "alps", "reconstruction_epochs": 0},
    "best": {"effort": "best"},
    "sparsegpt-owl": {"method": "sparsegpt", "reconstruction_epochs": 0, "allocation": "owl"},
    "sparsegpt-loss": {"method": "sparsegpt", "reconstruction_epochs": 0, "allocation": "kl"},
    "best-uniform": {"effort": "best", "allocation": "uniform"},
}


def main() -> None:
    """Command line."""
    usual = [method for method, settings in METHODS.items() if "allocation" not in settings]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument(
        "--train",
        nargs="+",
        default=[str(ROOT / "examples/text/train.txt")],
        help="each method that calibrates runs with each",
    )
    scoring.options(parser)
    parser.add_argument("--methods", nargs="+", default=usual, choices=list(METHODS))
    parser.add_argument("--amounts", nargs="+", default=list(AMOUNTS), choices=list(AMOUNTS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--section", default="prune", help="of docs/benchmarks.md; '-' prints only")
    args = parser.parse_args()
    import compress

    texts = scoring.held_out(args)
    rows = []
    scratch = Path(tempfile.mkdtemp(prefix="compress-bench-"))
    try:
        for amount in args.amounts:
            for method in args.methods:
                if "pattern" in AMOUNTS[amount] and "allocation" in METHODS[method]:
                    continue  # N:M leaves nothing to allocate
                draws, seconds, errors = [], [], []
                for train in args.train if method != "magnitude" else args.train[:1]:
                    shutil.rmtree(scratch / "out", ignore_errors=True)
                    start, details = time.perf_counter(), {}
                    compress.apply(
                        "prune_unstructured",
                        args.model,
                        scratch / "out",
                        **scoring.calibration(train, args.samples),
                        details=details,
                        **AMOUNTS[amount],
                        **METHODS[method],
                    )
                    seconds.append(time.perf_counter() - start)
                    errors += [t["error"] for b in details.get("blocks", ()) for t in b.get("tensors", {}).values()]
                    draws.append(texts.score(scratch / "out"))
                error = f"{statistics.mean(e for e in errors if e is not None):.4f}" if errors else "–"
                rows.append([amount, method, *texts.cells(draws), error, f"{statistics.mean(seconds):.1f}"])
                rows[-1].append(page.others(args.model, amount, None if "best" in method else method.partition("-")[0]))
                print(*rows[-1], flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    model = page.model_name(args.model)
    notes = [
        f"`{page.command('bench-prune', parser, args)}`: {page.environment()}",
        f"{args.samples} × {scoring.WINDOW} calibration tokens. {texts.note()}",
    ]
    if any(method.startswith("best") for method in args.methods):
        notes.append("`best` is `effort: best`: ALPS, sparsity by KL but for N:M, then block reconstruction.")
    if tried := [method for method in args.methods if "allocation" in METHODS[method]]:
        notes.append(f"{', '.join(f'`{m}`' for m in tried)}: with that `allocation`; the others are uniform.")
    notes.append("Seconds cover the whole call: loading, self-check and writing.")
    table = [
        f"## Pruning {model}" + ("" if args.methods in (usual, ["best"]) else f": {', '.join(args.methods)}"),
        "",
        " ".join(notes),
        "",
        *page.table(
            ["removed", "method", *scoring.COLUMNS, "layer error", "seconds", "others, ΔNLL"],
            rows,
        ),
    ]
    page.deliver(args.section, table)


if __name__ == "__main__":
    main()
