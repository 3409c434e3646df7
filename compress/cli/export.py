"""The command ``export`` and its options."""

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.commands.common import Code
from compress.cli.options import AllowLinks, AsJson, CheckpointArgument, IgnoreCode, Offline, Quiet, Trust

ExportTarget = Annotated[
    str,
    typer.Option(
        "--to",
        help="gguf: a file for llama.cpp. onnx: a folder for onnxruntime, genai, transformers.js, OpenVINO. pt2: a program of "
        "torch.export.",
        metavar="gguf|onnx|pt2",
    ),
]
ExportOutput = Annotated[
    Path, typer.Option("--output", "-o", help="File or folder to write. It must not exist.", metavar="PATH")
]
ExportType = Annotated[
    str | None,
    typer.Option(
        "--type",
        help="gguf: round the matrices of blocks to this type, such as Q4_K or Q4_K_M. By default they stay as they are.",
    ),
]
ExportEmbeddings = Annotated[
    str | None,
    typer.Option(
        "--embeddings",
        help="gguf: type of float embeddings and head: keep, Q8_0, Q6_K or others. By default Q8_0 where other matrices are "
        "quantised.",
    ),
]
ExportImatrix = Annotated[
    str | None,
    typer.Option("--imatrix", help="gguf: an imatrix.gguf, which k- and i-quants weigh errors by.", metavar="FILE"),
]
ExportAccuracy = Annotated[
    int | None,
    typer.Option(
        "--accuracy-level",
        help="onnx: 1: products are computed with floats (default). 4: their inputs are rounded to 8 bits, which is faster.",
        metavar="1|4",
    ),
]
ExportDtype = Annotated[
    str | None, typer.Option("--dtype", help="pt2: float32 (default), bfloat16 or float16.", metavar="DTYPE")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show size and types; write nothing.")]


def export(
    checkpoint: CheckpointArgument,
    to: ExportTarget,
    output: ExportOutput,
    type_: ExportType = None,
    embeddings: ExportEmbeddings = None,
    imatrix: ExportImatrix = None,
    accuracy_level: ExportAccuracy = None,
    dtype: ExportDtype = None,
    dry_run: DryRun = False,
    trust_remote_code: Trust = False,
    ignore_auto_map: IgnoreCode = False,
    allow_links: AllowLinks = False,
    offline: Offline = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint as a file of another runtime, such as GGUF for llama.cpp.

    Codes are taken over as they are. What the target cannot hold is refused with the setting that would do.
    """
    from compress.cli.commands import export as command

    command.export(
        checkpoint,
        to,
        output,
        given={
            "type": type_,
            "embeddings": embeddings,
            "imatrix": imatrix,
            "accuracy_level": accuracy_level,
            "dtype": dtype,
        },
        dry_run=dry_run,
        code=Code(trust_remote_code, ignore_auto_map, allow_links),
        offline=offline,
        json=json,
        quiet=quiet,
    )
