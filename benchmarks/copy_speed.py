"""CPU time of casting to fp8 without data, beside that of a copy: `make bench-copy [MODEL=]`, a section of docs/benchmarks.md.

Whole processes in turns, the median of each: `cp -r`, `import torch`, and `compress run` with recipes that measure nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks import page, scoring
from benchmarks.start import cpu_seconds


def main() -> None:
    """Measure, print, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(scoring.ROOT / "examples/tiny-lm"))
    parser.add_argument("--schemes", nargs="+", default=["FP8_DYNAMIC", "FP8_BLOCK"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--section", default="copy", help="of docs/benchmarks.md; '-' prints only")
    args = parser.parse_args()
    model, scratch = str(Path(args.model).resolve()), Path(tempfile.mkdtemp(prefix="compress-bench-"))
    jobs = {
        "`cp -r`": ["cp", "-r", model, str(scratch / "out")],
        "`import torch`": [sys.executable, "-c", "import torch"],
    }
    for scheme in args.schemes:
        recipe = {
            "model": model,
            "output": str(scratch / "out"),
            "passes": [{"cast": {"scheme": scheme, "method": "rtn"}}],
        }
        (scratch / f"{scheme}.json").write_text(json.dumps(recipe))
        jobs[f"`{scheme}`"] = [sys.executable, "-m", "compress", "run", str(scratch / f"{scheme}.json"), "--quiet"]
    times: dict[str, list[float]] = {name: [] for name in jobs}
    try:
        for turn in range(args.turns + 1):  # the first fills caches
            for name, command in jobs.items():
                seconds = cpu_seconds(command)
                for path in scratch.glob("out*"):
                    shutil.rmtree(path)
                if turn:
                    times[name].append(seconds)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    least = sum(list(medians.values())[:2])
    rows = [[name, f"{value:.2f}", f"{value / least:.2f}"] for name, value in medians.items()]
    lines = [
        f"## Casting {page.model_name(args.model)} at the speed of a copy",
        "",
        f"`{page.command('bench-copy', parser, args)}`: {page.environment()} CPU seconds of the whole process, one thread, "
        f"median of {args.turns} turns. Recipes without evaluation; every tensor is decoded from the files and compared.",
        "",
        *page.table(["job", "CPU s", "ratio to `cp -r` and `import torch`"], rows),
    ]
    page.deliver(args.section, lines)


if __name__ == "__main__":
    main()
