"""Codes of the table of tokens and of the head, for vLLM: `make bench-tables [MODEL= TRAIN= HELDOUT=]`.

All other tensors stay in bfloat16. A head that shares the table's weights gets codes of its own, because vLLM reads no shared
ones; `store: compact` keeps one table for both.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import page, scoring

#: Formats of table and head; None: bfloat16.
ROWS = (("int8", "int8"), ("int4", "int8"), ("int4", "int4"), ("int8", None))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(scoring.ROOT / "examples/tiny-lm"))
    parser.add_argument("--section", default="tables", help="of docs/benchmarks.md; '-' prints only")
    scoring.options(parser)
    args = parser.parse_args()
    import compress
    from compress.architectures.model_map import model_map
    from compress.checkpoint.open import open_checkpoint

    scratch, rows = Path(tempfile.mkdtemp(prefix="compress-bench-")), list[list[str]]()
    try:
        base = compress.apply("cast", args.model, scratch / "base", weights="bf16", allow_noop=True)
        texts = scoring.held_out(argparse.Namespace(**{**vars(args), "model": str(base)}))
        mapped = model_map(open_checkpoint(base).spec)
        assert mapped.embedding is not None
        assert mapped.head_weight is not None
        table, head = mapped.embedding.removesuffix(".weight"), mapped.head_weight.module

        def row(names: tuple[str, str], folder: Path, store: str) -> None:
            scores = texts.score(compress.load(folder, dtype="float32", trust_remote_code=True))
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            rows.append([*names, store, f"{size:,}", *texts.cells([scores])])
            print(" | ".join(rows[-1]), flush=True)
            if folder != base:
                shutil.rmtree(folder)

        def cast(formats: dict[str, str], **more: Any) -> Path:
            one = {
                "weights": next(iter(formats.values())),
                "only": list(formats),
                "overrides": formats,
                "method": "mse",
            }
            return compress.apply("cast", base, scratch / "out", **one, **more)

        row(("bf16", "shared" if mapped.tied else "bf16"), base, "stock")
        for first, second in ROWS:
            formats = {table: first, head: second or "bf16"}
            row((first, second or "bf16"), cast(formats, runtime="vllm"), "stock, `runtime: vllm`")
        for first in ("int8", "int4") if mapped.tied else ():
            row((first, "shared"), cast({table: first}, store="compact"), "compact")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    lines = [
        f"## Codes of tables on {page.model_name(args.model)}",
        "",
        f"`{page.command('bench-tables', parser, args)}`: {page.environment()} {texts.note()} All other tensors are in "
        "bfloat16. Codes are rounded, `method: mse`: int8 with a scale for each token, int4 in groups of 64 where these fit.",
        "",
        *page.table(["table", "head", "store", "bytes", *scoring.COLUMNS], rows),
    ]
    page.deliver(args.section, lines)


if __name__ == "__main__":
    main()
