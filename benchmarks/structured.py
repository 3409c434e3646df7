"""Held-out loss and speed after removing whole units.

`make bench-structured [MODEL= TRAIN= HELDOUT=]`, a section of docs/benchmarks.md.

The scores of benchmarks/scoring.py for each kind of removal: chosen by activation
(or block influence) without repair, with least squares, and with the pass's defaults. With --speed also the time to read a
prompt (logits of its last token alone) and to generate, and the peak memory, of a random Llama of 124 M parameters that loses
half of its blocks' parameters; `--jobs --speed` measures and prints that alone.
REFERENCE may name a JSON file with figures of other tools: {"MLP 25%": 0.0838, …}.
"""

from __future__ import annotations

import argparse
import json
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
from benchmarks.versus import wide  # noqa: E402

JOBS: dict[str, dict[str, Any]] = {
    "MLP 25%": {"mlp": 0.25},
    "MLP 50%": {"mlp": 0.5},
    "MLP 25% uneven": {"mlp": 0.25, "allocation": "kl"},
    "MLP 50% uneven": {"mlp": 0.5, "allocation": "kl"},
    "heads 25%": {"heads": 0.25},
    "1 block": {"layers": 1},
    "2 blocks": {"layers": 2},
    "3 blocks": {"layers": 3},
}
WAYS: dict[str, dict[str, Any]] = {
    "simple score, no repair": {
        "importance": "activation",
        "layer_importance": "block_influence",
        "compensation": "none",
    },
    "least squares": {"compensation": "least_squares"},
    "default": {},
}


def speed(model: str) -> list[str]:
    """Time and memory of a larger random model at half of its blocks' parameters, beside the whole one."""
    import compress
    from compress.evaluation.latency import measure_latency

    rows = []
    scratch = Path(tempfile.mkdtemp(prefix="compress-bench-"))
    try:
        wide(scratch / "whole", model)
        for what, settings in (
            ("6 of 12 blocks", {"layers": [3, 4, 5, 6, 7, 8]}),
            ("half of MLP and of heads", {"mlp": 0.5, "heads": 0.5}),
        ):
            shutil.rmtree(scratch / "small", ignore_errors=True)
            compress.apply(
                "prune_structured",
                scratch / "whole",
                scratch / "small",
                importance="magnitude",
                compensation="none",
                **settings,
            )
            found = measure_latency([scratch / "whole", scratch / "small"], dtype="float32", device="cpu")["candidate"]
            ratios = [f"{1 / found[k]['ratio']:.2f} ×" for k in ("prefill", "decode")]
            rows.append([what, *ratios, f"{found['memory']['ratio']:.2f} ×"])
            print(*rows[-1], flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [
        "",
        "A Llama of 124 M parameters with random weights, float32, beside the whole model in the same run. A prompt has "
        "256 tokens; the last one gets logits.",
        "",
        *page.table(["without", "prefill faster", "decode faster", "memory"], rows),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument(
        "--train", nargs="+", default=[str(ROOT / "examples/text/train.txt")], help="defaults run with each"
    )
    scoring.options(parser)
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--reference", type=Path, help="figures of other tools, JSON")
    parser.add_argument("--speed", action="store_true", help="measure time on a larger model too")
    parser.add_argument("--section", default="structured", help="of docs/benchmarks.md; '-' prints only")
    args = parser.parse_args()
    if not args.jobs:
        print("\n".join(speed(args.model)))
        return
    import compress

    reference = json.loads(args.reference.read_text()) if args.reference else {}
    texts = scoring.held_out(args)
    rows = []
    scratch = Path(tempfile.mkdtemp(prefix="compress-bench-"))
    try:
        for job in args.jobs:
            for way, settings in WAYS.items():
                if way == "least squares" and "block" in job:
                    continue  # nothing reads what is gone
                draws, seconds = [], []
                for train in args.train if way == "default" else args.train[:1]:
                    shutil.rmtree(scratch / "out", ignore_errors=True)
                    start = time.perf_counter()
                    compress.apply(
                        "prune_structured",
                        args.model,
                        scratch / "out",
                        store="compact" if "uneven" in job else "stock",
                        **scoring.calibration(train, args.samples),
                        **JOBS[job],
                        **settings,
                    )
                    seconds.append(time.perf_counter() - start)
                    draws.append(texts.score(scratch / "out"))
                others = [f"{reference[job]:.4f}" if job in reference else ""] if reference else []
                rows.append([job, way, *texts.cells(draws), f"{statistics.mean(seconds):.1f}", *others])
                print(*rows[-1], flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    table = [
        f"## Removing units of {Path(args.model).name}",
        "",
        f"`{page.command('bench-structured', parser, args)}`: {page.environment()} "
        f"{args.samples} × {scoring.WINDOW} calibration tokens. {texts.note()} "
        "`uneven`: with `allocation: kl`. "
        "`simple score, no repair` removes the least active neurons and heads, and the blocks that change their input "
        "least. `default` is the pass with its defaults; seconds cover the whole call: loading, self-check and writing.",
        "",
        *page.table(
            ["removed", "way", *scoring.COLUMNS, "seconds", *(["others, no repair"] if reference else [])], rows
        ),
    ]
    page.deliver(args.section, table + (speed(args.model) if args.speed else []))


if __name__ == "__main__":
    main()
