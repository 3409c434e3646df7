"""Whether `distill` with its defaults makes a pruned student better in a few steps: `make bench-recover MODEL= ARGS=`.

Each CUT, settings of `prune_structured` in JSON, is taken from MODEL; then it is distilled for STEPS steps under MODEL, with
the defaults and at each of RATES. Rows for docs/passes/distill.md: the held-out loss in training before and after.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page  # noqa: E402


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--train", default=str(ROOT / "examples/text/train.txt"))
    parser.add_argument("--cuts", nargs="+", type=json.loads, default=[{"layers": 1}, {"mlp": "25%"}])
    parser.add_argument("--rates", nargs="*", type=float, default=[5e-4], help="beside the default")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64, help="to calibrate the cut with")
    args = parser.parse_args()
    import compress

    text: dict[str, Any] = {"data": args.train, "length": args.length, "document_separator": "<|doc|>"}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, cut in enumerate(args.cuts):
            student = Path(scratch) / f"student{number}"
            ids = {} if cut.get("compensation") == "none" else {**text, "samples": args.samples}
            compress.apply("prune_structured", args.model, student, **ids, **cut)
            for rate in (None, *args.rates):
                details: dict[str, Any] = {}
                how = {"steps": args.steps, "batch_size": args.batch, "validation_samples": args.held_out}
                how |= {"evaluate_every": args.steps} | ({} if rate is None else {"learning_rate": rate})
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a training that does not help is what is looked for
                    out = Path(scratch) / f"out{len(rows)}"
                    compress.apply("distill", student, out, teacher=args.model, details=details, **how, **text)
                said = details["training"]
                before, after = (said["held_out"][i]["loss"] for i in (0, -1))
                shown = f"{said['rate']:.2g}" + " (default)" * (rate is None)
                rows.append([json.dumps(cut), shown, f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.1%}"])
                print(*rows[-1], flush=True)
    print(*page.table(["cut", "peak rate", "held out before", "after", "change"], rows), sep="\n")


if __name__ == "__main__":
    main()
