"""The commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(
    name="compress",
    help="Make Hugging Face checkpoints smaller, pass by pass, and gate the result.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich help costs 50 ms at every start
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(help="Recipe (YAML).", metavar="RECIPE")]
Sets = Annotated[
    Optional[list[str]],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, such as passes.0.cast.weights=fp16. May be repeated."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
CheckpointArgument = Annotated[
    str, typer.Argument(help="Folder or hub id (optionally @revision).", metavar="CHECKPOINT")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Allow a checkpoint's own Python code.")]
IgnoreCode = Annotated[
    bool,
    typer.Option("--ignore-auto-map", help="Take transformers' own class where a checkpoint names code of its own."),
]
Offline = Annotated[bool, typer.Option("--offline", help="No network, also for hub ids.")]


def _version(value: bool) -> None:
    if value:
        from compress import __version__

        typer.echo(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipeFile,
    sets: Sets = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute every stage anew.")] = False,
    publish_anyway: Annotated[bool, typer.Option("--publish-anyway", help="Publish although a gate fails.")] = False,
    offline: Offline = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: every pass, the measurements, the gates.

    Exit status: 0 done and gates passed, 1 a gate failed, 2 bad recipe or input, 3 a gate was inconclusive,
    4 out of memory or disk, 70 a bug, 130 interrupted.
    """
    from compress.cli import commands

    commands.run(
        recipe, sets or [], fresh=fresh, publish_anyway=publish_anyway, offline=offline, json=json, quiet=quiet
    )


@app.command()
def check(
    recipe: RecipeFile,
    sets: Sets = None,
    data: Annotated[
        bool,
        typer.Option("--data", help="Read the text too, and look for documents that evaluation shares with passes."),
    ] = False,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print the final recipe with every default.")] = False,
    json: AsJson = False,
) -> None:
    """Report every mistake of a recipe at once, with its place and a suggestion. Reads no weights."""
    from compress.cli import commands

    commands.check(recipe, sets or [], data=data, resolved=resolved, json=json)


@app.command()
def plan(recipe: RecipeFile, sets: Sets = None, offline: Offline = False, json: AsJson = False) -> None:
    """Show sizes, parameters, peak memory and disk of every stage, from headers alone."""
    from compress.cli import commands

    commands.plan(recipe, sets or [], offline=offline, json=json)


@app.command()
def inspect(
    checkpoint: CheckpointArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="A row for every tensor.")] = False,
    zeros: Annotated[bool, typer.Option("--zeros", help="Read the weights and count zeros.")] = False,
    trust_remote_code: Trust = False,
    ignore_auto_map: IgnoreCode = False,
    offline: Offline = False,
    json: AsJson = False,
) -> None:
    """Show tensors, dtypes, storage, sparsity, ties and bytes by module."""
    from compress.cli import commands

    code = commands.Code(trust_remote_code, ignore_auto_map)
    commands.inspect(checkpoint, tensors=tensors, zeros=zeros, code=code, offline=offline, json=json)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="Checkpoint before.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Checkpoint after.", metavar="B")],
    headers: Annotated[bool, typer.Option("--headers", help="Compare headers alone, not values.")] = False,
    trust_remote_code: Trust = False,
    ignore_auto_map: IgnoreCode = False,
    json: AsJson = False,
) -> None:
    """Show what changed between two checkpoints, by module. Exit status 0 also where they differ."""
    from compress.cli import commands

    commands.diff(a, b, values=not headers, code=commands.Code(trust_remote_code, ignore_auto_map), json=json)


@app.command(name="eval")
def evaluate(
    checkpoint: CheckpointArgument,
    data: Annotated[
        Optional[list[str]],
        typer.Option(
            "--data",
            help="Text: .txt, .jsonl, .json, .csv, .tsv, .parquet; also .gz, .zst. May be repeated. Or a folder with a "
            "folder of images for each class.",
        ),
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Field of the text, in files that have fields.")] = "text",
    template: Annotated[
        Optional[str],
        typer.Option("--template", help='Text of a row from several columns, such as "{question} {answer}".'),
    ] = None,
    text: Annotated[
        Optional[list[str]],
        typer.Option("--text", help="Of labelled files the column of the text; given twice, of both texts of a pair."),
    ] = None,
    label: Annotated[
        Optional[str],
        typer.Option("--label", help="Column of the label; for classifiers of text and for scores of pairs."),
    ] = None,
    baseline: Annotated[
        Optional[str],
        typer.Option("--baseline", help="Checkpoint to compare with, or a file that `eval --json` wrote."),
    ] = None,
    metric: Annotated[
        Optional[list[str]],
        typer.Option(
            "--metric",
            help="bits_per_byte, perplexity, accuracy, f1, similarity, spearman, kl, agreement, latency, memory; by default "
            "those of the model's task. May be repeated.",
        ),
    ] = None,
    separator: Annotated[Optional[str], typer.Option("--separator", help="Text between documents.")] = None,
    window: Annotated[int, typer.Option("--window", help="Tokens of context.", min=2)] = 256,
    stride: Annotated[
        Optional[int], typer.Option("--stride", help="Tokens between windows; the window by default.", min=1)
    ] = None,
    max_documents: Annotated[
        Optional[int], typer.Option("--max-documents", min=1, help="Only the first of them.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16, of computation.")] = "float32",
    full_kv_cache: Annotated[
        bool,
        typer.Option(
            "--full-kv-cache", help="Do not round keys and values where the config says that they are cached in fp8."
        ),
    ] = False,
    confidence: Annotated[float, typer.Option("--confidence", help="Of the intervals.", min=0.5, max=0.9999)] = 0.95,
    trust_remote_code: Trust = False,
    ignore_auto_map: IgnoreCode = False,
    offline: Offline = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a checkpoint as a recipe would; with --baseline paired with another one."""
    from compress.cli import commands

    commands.evaluate(
        checkpoint,
        data or [],
        baseline=baseline,
        metrics=metric or [],
        separator=separator,
        field=field,
        template=template,
        text=text or [],
        label=label,
        window=window,
        stride=stride,
        max_documents=max_documents,
        device=device,
        dtype=dtype,
        quantized_kv_cache=not full_kv_cache,
        confidence=confidence,
        code=commands.Code(trust_remote_code, ignore_auto_map),
        offline=offline,
        json=json,
        quiet=quiet,
    )


@app.command()
def gate(
    subject: Annotated[str, typer.Argument(help="A run's report.json, or a checkpoint.", metavar="REPORT|CHECKPOINT")],
    baseline: Annotated[
        Optional[str],
        typer.Option("--baseline", help="For a checkpoint: what `eval --json` wrote, or another checkpoint."),
    ] = None,
    recipe: Annotated[Optional[Path], typer.Option("--recipe", help="Take the gates of this recipe.")] = None,
    gates: Annotated[
        Optional[list[str]],
        typer.Option(
            "--gate", metavar="KEY=VALUE", help="A gate, such as bits_per_byte.max_increase=3%. May be repeated."
        ),
    ] = None,
    confidence: Annotated[
        Optional[float], typer.Option("--confidence", help="Of the intervals.", min=0.5, max=0.9999)
    ] = None,
    junit: Annotated[Optional[Path], typer.Option("--junit", help="Write JUnit XML there (for a report).")] = None,
    trust_remote_code: Trust = False,
    ignore_auto_map: IgnoreCode = False,
    offline: Offline = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Judge a report, or a checkpoint against a baseline; the exit status is the verdict (0, 1 or 3)."""
    from compress.cli import commands

    commands.gate(
        subject,
        baseline=baseline,
        recipe=recipe,
        gates=gates or [],
        confidence=confidence,
        junit=junit,
        code=commands.Code(trust_remote_code, ignore_auto_map),
        offline=offline,
        json=json,
        quiet=quiet,
    )


@app.command(name="passes")
def list_passes(
    name: Annotated[Optional[str], typer.Argument(help="A pass; all of them by default.")] = None, json: AsJson = False
) -> None:
    """Explain the passes and every setting."""
    from compress.cli import commands

    commands.passes_(name, json=json)


@app.command()
def schema(
    report: Annotated[bool, typer.Option("--report", help="The schema of reports instead.")] = False,
) -> None:
    """Print the JSON schema of recipes, for editors."""
    from compress.cli import commands

    commands.schema(report=report)


@app.command()
def unpack(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist.", metavar="OUTPUT")],
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Size of a weight file.")] = "5GB",
    trust_remote_code: Trust = False,
    ignore_auto_map: IgnoreCode = False,
    quiet: Quiet = False,
) -> None:
    """Write the dense stock twin of a compact checkpoint."""
    from compress.cli import commands

    code = commands.Code(trust_remote_code, ignore_auto_map)
    commands.unpack(checkpoint, output, max_shard_size=max_shard_size, code=code, quiet=quiet)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Where to look.", metavar="FOLDER")] = Path(), json: AsJson = False
) -> None:
    """List run folders below a folder, with their stages and bytes, and what killed processes left."""
    from compress.cli import commands

    commands.runs(folder, json=json)


@app.command()
def clean(
    run_folder: Annotated[Path, typer.Argument(help="A run folder (OUTPUT.run), or the output itself.", metavar="RUN")],
    everything: Annotated[bool, typer.Option("--all", help="The whole run folder, its report too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, remove nothing.")] = False,
) -> None:
    """Remove stages, work and measurements that the last run did not use, and what killed runs left; the output stays."""
    from compress.cli import commands

    commands.clean(run_folder, everything=everything, dry_run=dry_run)
