"""CPU time of commands that should answer at once: `make bench-start` writes its section of docs/benchmarks.md.

Whole processes in turns, the median of each; the first turn fills caches and does not count. Beside them an empty interpreter
and `import torch`, by which another machine can be compared. With --dry nothing is written.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page  # noqa: E402

#: Command ▶ the CPU time that it may take, in ms; None without a bound.
COMMANDS = {
    "--help": 100,
    "check recipes/quickstart.yaml": 300,
    "passes": 200,
    "runs examples": 200,
    "passes cast": None,
    "plan recipes/quickstart.yaml": None,
    "inspect examples/tiny-lm": None,
}


def cpu_seconds(command: list[str]) -> float:
    """CPU time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, print, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    jobs = {
        "python -c pass": [sys.executable, "-c", "pass"],
        **{f"compress {words}": [sys.executable, "-m", "compress", *words.split()] for words in COMMANDS},
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(args.turns + 1):
        for name, command in jobs.items():
            seconds = cpu_seconds(command)
            if turn:
                times[name].append(seconds)
    bounds = {f"compress {words}": str(bound) for words, bound in COMMANDS.items() if bound}
    table = [[f"`{name}`", f"{1000 * statistics.median(v):.0f}", bounds.get(name, "")] for name, v in times.items()]
    made = f"`{page.command('bench-start', parser, args)}`: {page.environment()}"
    rows = ["## Start-up", "", f"{made} CPU time of the whole process, median of {args.turns} turns.", ""]
    rows += page.table(["command", "ms", "bound"], table)
    if not args.dry:
        page.put("start", rows)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
