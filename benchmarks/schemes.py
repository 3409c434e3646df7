"""Schemes of `cast` beside llm-compressor's: `make bench-schemes PEER=python [MODEL= TRAIN= HELDOUT=]`.

PEER is the interpreter of an environment with llm-compressor. Both tools get the model in bfloat16 and the same calibration
ids, and write a compressed-tensors checkpoint; `compress.load` reads both, and rounds inputs as stock transformers does.
llm-compressor runs GPTQ for integers and rounds floats, as its examples do; `cast` runs with its defaults. ``--transforms``
puts smoothing or rotations before both (SmoothQuantModifier, SpinQuantModifier).
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import page, scoring
from benchmarks.peers import call

TOOL = "llm-compressor"
#: Transforms before rounding ▶ settings of `cast`, and what llm-compressor has for them.
TRANSFORMS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, ""),
    "smoothing-0.5": ({"smoothing": 0.5}, "SmoothQuant=0.5+"),
    "smoothing-0.8": ({"smoothing": 0.8}, "SmoothQuant=0.8+"),
    "values": ({"rotations": ["values"]}, "SpinQuant=R2+"),
    "rotations": ({"rotations": ["residual", "values"]}, "SpinQuant=R1,R2+"),
    "both": ({"rotations": ["residual", "values"], "smoothing": 0.5}, "SpinQuant=R1,R2;SmoothQuant=0.5+"),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=sys.executable, help="python of an environment with llm-compressor")
    parser.add_argument("--model", default=str(scoring.ROOT / "examples/tiny-lm"))
    parser.add_argument("--train", default=str(scoring.ROOT / "examples/text/train.txt"))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--schemes", nargs="+", default=["W4A16", "W8A8", "FP8_BLOCK", "NVFP4"])
    parser.add_argument("--group", type=int, help="inputs that share a scale, of integers but W8A8, in both tools")
    parser.add_argument("--transforms", nargs="+", choices=TRANSFORMS, default=["none"], help="before rounding")
    parser.add_argument("--method", choices=["rtn"], help="of both tools; by default GPTQ, and RTN for its floats")
    parser.add_argument("--effort", default="balanced", help="of `cast`")
    parser.add_argument("--section", default="schemes", help="of docs/benchmarks.md; '-' prints only")
    scoring.options(parser)
    args = parser.parse_args()
    from safetensors.torch import save_file

    import compress

    scratch, rows = Path(tempfile.mkdtemp(prefix="compress-bench-")), list[list[str]]()
    try:
        base = compress.apply("cast", args.model, scratch / "base", weights="bf16", allow_noop=True)
        texts = scoring.held_out(argparse.Namespace(**{**vars(args), "model": str(base)}))
        samples = scoring.calibration_samples(args.model, args.train, args.samples)
        save_file({"ids": samples.ids.contiguous()}, scratch / "ids.safetensors")

        def row(scheme: str, tool: str, folder: Path, seconds: float) -> None:
            try:
                cells = texts.cells([texts.score(compress.load(folder, dtype="float32"))])
            except compress.CompressError as error:
                print(error, flush=True)
                cells = ["not readable"] * len(scoring.COLUMNS)
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            rows.append([scheme, tool, *cells, f"{size:,}", f"{seconds:.0f}"])
            print(" | ".join(rows[-1]), flush=True)
            shutil.rmtree(folder)

        for scheme, transform in itertools.product(args.schemes, args.transforms):
            start = time.process_time()
            data: Any = samples.ids
            grouped = args.group and scheme.startswith("W") and scheme != "W8A8"
            settings, peer = TRANSFORMS[transform]
            more = (
                settings | ({"group_size": args.group} if grouped else {}) | ({"method": "rtn"} if args.method else {})
            )
            ours = compress.apply(
                "cast", base, scratch / "ours", data=data, scheme=scheme, effort=args.effort, dtype="float32", **more
            )
            before = "" if transform == "none" else f", {transform}"
            row(scheme, f"`cast`, {args.method or args.effort}{before}", ours, time.process_time() - start)
            theirs_by = "GPTQ" if scheme.startswith("W") and not args.method else "RTN"
            job = f"{peer}{theirs_by} {scheme}" + (f":{args.group}" if grouped else "")
            theirs = scratch / "theirs"
            try:
                answer = call(args.peer, "llm_schemes", str(base), str(scratch / "ids.safetensors"), job, theirs)
            except SystemExit as error:  # a scheme or transform that the other tool refuses
                print(f"{TOOL}, {job}: {str(error).strip().splitlines()[-1]}", flush=True)
                continue
            row(scheme, f"{TOOL}, {job.partition(' ')[0]}", theirs, answer["cpu_s"])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    lines = [
        f"## Schemes on {page.model_name(args.model)}",
        "",
        f"`{page.command('bench-schemes', parser, args)}`: {page.environment()} {args.samples} × {scoring.WINDOW} calibration "
        f"tokens, the same for both tools; the model in bfloat16. {texts.note()} Inputs are rounded as the scheme says. CPU "
        "seconds are of the method, with one thread, beside other jobs.",
        "",
        *page.table(["scheme", "tool", *scoring.COLUMNS, "bytes", "CPU s"], rows),
    ]
    page.deliver(args.section, lines)


if __name__ == "__main__":
    main()
