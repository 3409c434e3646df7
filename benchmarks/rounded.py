"""Held-out loss with quantised inputs and caches.

`make bench-rounded [MODEL= TRAIN= HELDOUT=]`, a section of docs/benchmarks.md.

For int8 and fp8 weights (per channel, rounded to nearest): the scores of benchmarks/scoring.py, and how often the likeliest
token stays; without and with inputs
quantised token by token, and with keys and values in fp8, by scales from TRAIN or without. The first windows of 256 tokens of
each held-out text. Each row but the first of a format is what `compress eval` measures.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page, scoring  # noqa: E402

#: Scales of the cache ▶ how a row names them.
CACHES = {
    "tensor": "fp8, a scale per layer",
    "head": "fp8, a scale per head",
    "none": "fp8, scale 1",
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--train", default=str(ROOT / "examples/text/train.txt"))
    scoring.options(parser)
    parser.add_argument("--weights", nargs="+", default=["int8", "fp8"], choices=["int8", "fp8"])
    parser.set_defaults(windows=100)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--section", default="rounded", help="of docs/benchmarks.md; '-' prints only")
    args = parser.parse_args()
    import torch

    import compress

    texts = scoring.held_out(args)
    original = torch.cat([text.losses for text in texts.dense[:-1]])
    rows: list[list[str]] = []
    scratch = Path(tempfile.mkdtemp(prefix="compress-bench-"))

    def row(folder: Path, weights: str, inputs: bool, cache: str | None) -> None:
        how = {"quantized_activations": inputs, "quantized_kv_cache": cache is not None}
        scores = texts.score(compress.load(folder, dtype="float32", **how))
        rise = torch.cat([score.losses for score in scores[:-1]]) - original
        error = float(rise.std()) / math.sqrt(len(rise))
        same = statistics.mean(score.agreement for score in scores[:-1])
        named = "–" if cache is None else CACHES[cache]
        _, *others = texts.cells([scores])
        shown = [f"{rise.mean():+.5f} ± {error:.5f}", *others, f"{same:.2%}"]
        rows.append([weights, weights if inputs else "–", named, *shown])
        print(" | ".join(rows[-1]), flush=True)

    try:
        for weights in args.weights:
            for scales in CACHES:
                settings = {"weights": weights, "method": "rtn", "activations": weights, "kv_cache": "fp8"}
                out = scratch / f"{weights}-{scales}"
                data = scoring.calibration(args.train, args.samples)
                compress.apply("cast", args.model, out, **data, kv_cache_scales=scales, **settings)
                if scales == "tensor":
                    row(out, weights, False, None)
                    row(out, weights, True, None)
                row(out, weights, True, scales)
                shutil.rmtree(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    name = Path(args.model).name
    lines = [f"## Quantised inputs and caches of {name}", ""]
    lines += [f"`{page.command('bench-rounded', parser, args)}`: {page.environment()}", ""]
    lines += [
        f"{texts.note()} ΔNLL with its standard error over windows; agreement: share of tokens with the same top-1 "
        "prediction.",
        "",
        *page.table(["weights", "inputs", "keys and values", *scoring.COLUMNS, "top-1 agreement"], rows),
    ]
    page.deliver(args.section, lines)


if __name__ == "__main__":
    main()
