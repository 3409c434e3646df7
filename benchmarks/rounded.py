"""Held-out loss with quantised inputs and caches.

`make bench-rounded [MODEL= TRAIN= HELDOUT=]`, a section of docs/benchmarks.md.

For int8 and fp8 weights (per channel, rounded to nearest): the rise of the mean negative log-likelihood per token over the
original, in nats, with its standard error over windows, and how often the likeliest token stays; without and with inputs
quantised token by token, and with keys and values in fp8, by scales from TRAIN or without. The first windows of 256 tokens of
each held-out text, read as one stream, in float32. Each row but the first of a format is what `compress eval` measures.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page  # noqa: E402
from benchmarks.prune import calibration, heldout  # noqa: E402

#: Scales of the cache ▶ how a row names them.
CACHES = {
    "tensor": "fp8, a scale per layer",
    "head": "fp8, a scale per head",
    "none": "fp8, scale 1",
}


def measured(model: Any, texts: list[Any]) -> tuple[Any, Any]:
    """Of every window the mean negative log-likelihood, float64 [windows]; and the likeliest tokens."""
    import torch

    losses, likeliest = [], []
    with torch.inference_mode():
        for batch in torch.cat(texts).split(4):
            logits = model(batch, use_cache=False).logits[:, :-1].float()
            found = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
            losses.append(found.double().mean(1))
            likeliest.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(likeliest)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--train", default=str(ROOT / "examples/text/train.txt"))
    parser.add_argument("--heldout", nargs="+", default=[str(ROOT / "examples/text/test.txt")])
    parser.add_argument("--weights", nargs="+", default=["int8", "fp8"], choices=["int8", "fp8"])
    parser.add_argument("--windows", type=int, default=100, help="of each held-out text")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--section", default="rounded", help="of docs/benchmarks.md; '-' prints only")
    args = parser.parse_args()
    import compress

    texts = [windows[: args.windows] for windows in heldout(args.model, args.heldout)]
    original, choices = measured(compress.load(args.model, dtype="float32"), texts)
    rows: list[list[str]] = []
    scratch = Path(tempfile.mkdtemp(prefix="compress-bench-"))

    def row(folder: Path, weights: str, inputs: bool, cache: str | None) -> None:
        how = {"quantized_activations": inputs, "quantized_kv_cache": cache is not None}
        found, chosen = measured(compress.load(folder, dtype="float32", **how), texts)
        rise = found - original
        error = float(rise.std()) / math.sqrt(len(rise))
        same = float((chosen == choices).double().mean())
        named = "–" if cache is None else CACHES[cache]
        rows.append([weights, weights if inputs else "–", named, f"{rise.mean():+.5f} ± {error:.5f}", f"{same:.2%}"])
        print(" | ".join(rows[-1]), flush=True)

    try:
        for weights in args.weights:
            for scales in CACHES:
                settings = {"weights": weights, "method": "rtn", "activations": weights, "kv_cache": "fp8"}
                out = scratch / f"{weights}-{scales}"
                data = calibration(args.train, args.samples)
                compress.apply("cast", args.model, out, **data, kv_cache_scales=scales, **settings)
                if scales == "tensor":
                    row(out, weights, False, None)
                    row(out, weights, True, None)
                row(out, weights, True, scales)
                shutil.rmtree(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    name, count = Path(args.model).name, sum(len(windows) for windows in texts)
    lines = [f"## Quantised inputs and caches of {name}", ""]
    lines += [f"`{page.command('bench-rounded', parser, args)}`: {page.environment()}", ""]
    lines += [
        f"Loss of the original {original.mean():.4f} nats per token, {count} windows of 256 tokens. Increase of the "
        "loss with its standard error over windows, and share of tokens with the same top-1 prediction.",
        "",
        *page.table(["weights", "inputs", "keys and values", "rise of the loss", "top-1 agreement"], rows),
    ]
    page.deliver(args.section, lines)


if __name__ == "__main__":
    main()
