"""Cost and quality of conversions of attention: `make bench-attention [MODEL= TRAIN= HELDOUT=] [ARGS="--jobs JOB…"]`.

Each job is a file of this folder and writes a section of docs/benchmarks.md. ``TITLE`` is its heading, and
``rows(options)`` returns the Markdown lines below it. MODEL is a checkpoint, TRAIN a text for calibration, HELDOUT the
texts that are scored. ``--section -`` prints the rows and leaves the page as it is.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page  # noqa: E402

JOBS = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name[0] != "_")


@dataclass(frozen=True)
class Options:
    """Files of a job.

    Attributes:
        model: checkpoint folder. train: calibration text. heldout: texts to score. quick: fewer samples, to try a job.
    """

    model: str
    train: str
    heldout: tuple[str, ...]
    quick: bool


def main() -> None:
    """Run the jobs and write their sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--train", default=str(ROOT / "examples/text/train.txt"))
    parser.add_argument("--heldout", nargs="+", default=[str(ROOT / "examples/text/test.txt")])
    parser.add_argument("--quick", action="store_true", help="fewer samples, to try a job")
    parser.add_argument(
        "--section", default="", help="- prints the rows; otherwise the page's section, by default the job's"
    )
    args = parser.parse_args()
    options = Options(args.model, args.train, tuple(args.heldout), args.quick)
    for job in args.jobs:
        module = importlib.import_module(f"benchmarks.attention.{job}")
        line = page.command("bench-attention", parser, args)
        rows = [f"## {module.TITLE}", "", f"`{line}`", "", page.environment(), "", *module.rows(options)]
        page.deliver(args.section or f"attention {job}", rows)


if __name__ == "__main__":
    main()
