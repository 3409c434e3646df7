"""Arguments and options of the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

#: The metrics of `compress.evaluation.metrics` and of speed. Written out, since help imports none of them.
METRICS = (
    "bits_per_byte", "perplexity", "accuracy", "repetition", "f1", "similarity", "spearman", "kl", "agreement", "latency",
    "memory",
)  # fmt: skip

RecipeFile = Annotated[Path, typer.Argument(help="Recipe (YAML).", metavar="RECIPE")]
RecipeOrModel = Annotated[Path, typer.Argument(help="Recipe (YAML); with --preset a model.", metavar="RECIPE|MODEL")]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="In place of a recipe, for a model: W4A16, W8A8, FP8, 2:4, recovery and others (`compress init -h`).",
    ),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder to write, in place of the recipe's.", metavar="FOLDER")
]
PublishAnyway = Annotated[bool, typer.Option("--publish-anyway", help="Publish the result even if a gate fails.")]
SharedOption = Annotated[
    Path | None,
    typer.Option(
        "--shared",
        help="Take finished stages and measurements from this folder, and put new ones there, for other runs.",
        metavar="FOLDER",
    ),
]
Minutes = Annotated[
    bool, typer.Option("--minutes", help="Measure this machine's CPU for half a minute, and keep its rates.")
]
Goal = Annotated[
    str,
    typer.Option(
        "--goal",
        help="small: fewest bytes at little loss. fast: fewer blocks and neurons. accurate: 8 bits.",
        metavar="small|fast|accurate",
    ),
]
InitPreset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="In place of a goal: a scheme of `cast` (W4A16, W8A8, FP8, FP8_BLOCK, NVFP4A16, …: `compress passes cast`), 2:4, "
        "50%, recovery.",
    ),
]
MaxBytes = Annotated[
    str | None, typer.Option("--max-bytes", help="Most bytes of the result, such as 500MB.", metavar="SIZE")
]
RecipeOutput = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="File to write, by default recipe.yaml; `-` for stdout.", metavar="FILE"),
]
SaveRecord = Annotated[
    Path | None,
    typer.Option("--save", help="Write the inferred architecture as a Python record.", metavar="FILE"),
]
RecipeFiles = Annotated[list[Path], typer.Argument(help="Recipes (YAML).", metavar="RECIPE...")]
Compared = Annotated[
    list[str], typer.Argument(help="Two checkpoints, or two or more runs (OUTPUT.run).", metavar="A B...")
]
CheckFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="github: also a line per mistake that GitHub shows at its place; the default in a workflow of GitHub. "
        "sarif: a SARIF document on stdout.",
        metavar="text|github|sarif",
    ),
]
ReadData = Annotated[
    bool,
    typer.Option("--data", help="Read the text too, and report documents that evaluation shares with passes."),
]
Resolved = Annotated[bool, typer.Option("--resolved", help="Print the resolved recipe, with every default.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe, such as passes.0.cast.weights=fp16. May be repeated.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")]
CheckpointArgument = Annotated[
    str, typer.Argument(help="Folder, or hub id, optionally with @revision.", metavar="CHECKPOINT")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Allow the Python code that a checkpoint brings.")]
IgnoreCode = Annotated[
    bool,
    typer.Option(
        "--ignore-auto-map", help="Ignore the Python code that a checkpoint brings; use transformers' own class."
    ),
]
AllowLinks = Annotated[
    bool, typer.Option("--allow-links", help="Follow symbolic links that lead out of a local checkpoint's folder.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Use no network. Hub ids come from the cache.")]

DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Text file: .txt, .jsonl, .json, .csv, .tsv or .parquet, also compressed (.gz, .zst). Or `default`, the text of "
        "the package. May be repeated. Or a folder with one folder of images per class.",
    ),
]
Field = Annotated[str, typer.Option("--field", help="Field that holds the text, in files that have fields.")]
Template = Annotated[
    str | None,
    typer.Option("--template", help='Text built from several columns of a row, such as "{question} {answer}".'),
]
TextColumns = Annotated[
    list[str] | None,
    typer.Option("--text", help="Column of the text in labelled files. Give it twice for the two texts of a pair."),
]
Label = Annotated[
    str | None,
    typer.Option("--label", help="Column of the label: a class for text classifiers, a score for pairs of texts."),
]
Baseline = Annotated[
    str | None, typer.Option("--baseline", help="Checkpoint to compare with, or a file that `eval --json` wrote.")
]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        help=f"{', '.join(METRICS)}. By default those of the model's task. May be repeated. A setting is given as "
        "latency.lengths=[512,2048].",
    ),
]
Separator = Annotated[str | None, typer.Option("--separator", help="Line that separates documents in text files.")]
Window = Annotated[int, typer.Option("--window", help="Tokens that the model reads at once.", min=2)]
Stride = Annotated[
    int | None,
    typer.Option("--stride", help="Tokens between the starts of two windows. By default the window.", min=1),
]
Streaming = Annotated[
    bool, typer.Option("--streaming", help="Read documents in segments of --window tokens through the cache.")
]
MaxDocuments = Annotated[
    int | None, typer.Option("--max-documents", min=1, help="Evaluate the first documents only, at most this many.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="Device to compute on: auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Number format of computation: float32, bfloat16 or float16.")]
FullKvCache = Annotated[
    bool,
    typer.Option("--full-kv-cache", help="Do not quantise keys and values where the config asks for an fp8 cache."),
]
Confidence = Annotated[float, typer.Option("--confidence", help="Confidence of the intervals.", min=0.5, max=0.9999)]
