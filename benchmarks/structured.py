"""Held-out loss and speed after removing whole units.

`make bench-structured [MODEL= TRAIN= HELDOUT=]`, a section of docs/benchmarks.md.

The scores of benchmarks/scoring.py for each kind of removal and each effort of the pass; `simple` chooses by activation, or
block influence, and repairs nothing. With --speed also the time to read a prompt (logits of its last token alone) and to
generate, and the peak memory, of a random Llama of 124 M parameters that loses half of its blocks' parameters; `--jobs --speed`
measures and prints that alone. What is done is kept in --results, where a run that was stopped goes on. `others` has
the figures of benchmarks/simple_scores.py.
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
    "1 KV group": {"kv_heads": 1},
    "1 block": {"layers": 1},
    "2 blocks": {"layers": 2},
    "3 blocks": {"layers": 3},
}
WAYS: dict[str, dict[str, Any]] = {
    "simple": {"importance": "activation", "layer_importance": "block_influence", "compensation": "none"},
    "fast": {"effort": "fast"},
    "balanced": {},
    "best": {"effort": "best"},
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


def measured(args: argparse.Namespace, texts: scoring.HeldOut, job: str, way: str) -> list[str]:
    """Scores and CPU seconds of one removal; by the usual effort on each draw of the calibration."""
    import compress

    draws, seconds = [], []
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as scratch:
        for number, train in enumerate(args.train if way == "balanced" else args.train[:1]):
            start = time.process_time()
            compress.apply(
                "prune_structured",
                args.model,
                f"{scratch}/{number}",
                store="compact" if "uneven" in job else "stock",
                **scoring.calibration(train, args.samples),
                **JOBS[job],
                **WAYS[way],
            )
            seconds.append(time.process_time() - start)
            draws.append(texts.score(f"{scratch}/{number}"))
    return [*texts.cells(draws), f"{statistics.mean(seconds):.0f}"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument(
        "--train", nargs="+", default=[str(ROOT / "examples/text/train.txt")], help="defaults run with each"
    )
    scoring.options(parser)
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--results", type=Path, default=ROOT / "out/bench-structured")
    parser.add_argument("--speed", action="store_true", help="measure time on a larger model too")
    parser.add_argument("--section", default="structured", help="of docs/benchmarks.md; '-' prints only")
    args = parser.parse_args()
    if not args.jobs:
        print("\n".join(speed(args.model)))
        return
    texts = scoring.held_out(args)
    file = args.results / f"{page.model_name(args.model)}-{args.samples}-{args.windows}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, list[str]] = json.loads(file.read_text()) if file.exists() else {}
    rows = []
    for job in args.jobs:
        for way in args.ways:
            key = f"{job}, {way}"
            if key not in done:
                done[key] = measured(args, texts, job, way)
                file.write_text(json.dumps(done, indent=1))
            rows.append([job, way, *done[key], page.others(args.model, job) if way == args.ways[-1] else ""])
            print(*rows[-1], flush=True)
    table = [
        f"## Removing units of {page.model_name(args.model)}",
        "",
        f"`{page.command('bench-structured', parser, args)}`: {page.environment()} "
        f"{args.samples} × {scoring.WINDOW} calibration tokens. {texts.note()} "
        "`uneven`: with `allocation: kl`. "
        "Ways are the efforts of the pass; `simple` removes the least active neurons and heads, and the blocks that change "
        "their input least, and repairs nothing. CPU seconds cover the whole call: loading, self-check and "
        "writing.",
        "",
        *page.table(["removed", "way", *scoring.COLUMNS, "CPU s", "others, ΔNLL"], rows),
    ]
    page.deliver(args.section, table + (speed(args.model) if args.speed else []))


if __name__ == "__main__":
    main()
