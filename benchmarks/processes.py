"""Two processes beside one: `make bench-processes [MODEL= TRAIN= ARGS=]`, a section of docs/benchmarks.md.

A recipe of one pass runs in one process and in several (torchrun), each with one thread: seconds of the stage, from opening the
checkpoint to the written one. It needs as many idle cores as processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page, scoring  # noqa: E402

JOBS: dict[str, dict[str, Any]] = {
    "int4, GPTQ alone": {"cast": {"weights": "int4", "effort": "fast"}},
    "int4": {"cast": {"weights": "int4"}},
    "50 %, SparseGPT alone": {"prune_unstructured": {"sparsity": 0.5, "effort": "fast"}},
    "50 %": {"prune_unstructured": {"sparsity": 0.5}},
}


def seconds(recipe: dict[str, Any], processes: int, folder: Path) -> float:
    """Seconds of the recipe's stage."""
    output = folder / "out"
    for path in (output, output.with_name("out.run")):
        shutil.rmtree(path, ignore_errors=True)
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({**recipe, "output": str(output)}))  # JSON is YAML
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, "-m", "compress", "run", str(file), "--quiet"],
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    (stage,) = json.loads((output.with_name("out.run") / "report.json").read_text())["stages"]
    return float(stage["seconds"]["apply_and_write"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--train", default=str(ROOT / "examples/text/train.txt"))
    parser.add_argument("--jobs", nargs="+", default=["int4, GPTQ alone", "50 %, SparseGPT alone"], choices=list(JOBS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--section", default="processes", help="of docs/benchmarks.md; '-' prints only")
    args = parser.parse_args()
    folder, rows = Path(tempfile.mkdtemp(prefix="compress-bench-")), []
    calibration = {"files": [args.train], "samples": args.samples, "length": scoring.WINDOW}
    try:
        for job in args.jobs:
            recipe = {
                "model": args.model,
                "document_separator": "<|doc|>",
                "data": {"calibration": calibration},
                "passes": [JOBS[job]],
            }
            alone, together = (seconds(recipe, n, folder) for n in (1, args.processes))
            rows.append([job, f"{alone:.1f}", f"{together:.1f}", f"{alone / together:.2f} ×"])
            print(*rows[-1], flush=True)
    finally:
        shutil.rmtree(folder)
    note = (
        f"`{page.command('bench-processes', parser, args)}`: {page.environment()} {args.samples} × {scoring.WINDOW} "
        "calibration tokens, one thread for each process. Seconds of the stage, from opening to the written checkpoint."
    )
    head = ["pass", "one process, s", f"{args.processes} processes, s", "faster"]
    page.deliver(
        args.section, [f"## Several processes: {page.model_name(args.model)}", "", note, "", *page.table(head, rows)]
    )


if __name__ == "__main__":
    main()
