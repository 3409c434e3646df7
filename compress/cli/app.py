"""The commands and their options."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from compress.cli.commands.common import Code
from compress.cli.export import export
from compress.cli.fit import fit
from compress.cli.help import GroupedHelp
from compress.cli.options import (
    AllowLinks,
    AsJson,
    Baseline,
    CheckFormat,
    CheckpointArgument,
    Compared,
    Confidence,
    DataOption,
    DeviceOption,
    Dtype,
    Field,
    FullKvCache,
    Goal,
    IgnoreCode,
    InitPreset,
    Label,
    MaxBytes,
    MaxDocuments,
    Metrics,
    Minutes,
    Offline,
    OutputOption,
    PresetOption,
    PublishAnyway,
    Quiet,
    ReadData,
    RecipeFiles,
    RecipeOrModel,
    RecipeOutput,
    Resolved,
    SaveRecord,
    Separator,
    Sets,
    SharedOption,
    Streaming,
    Stride,
    Template,
    TextColumns,
    Trust,
    Window,
)
from compress.cli.sweep import sweep

app = typer.Typer(
    name="compress",
    cls=GroupedHelp,
    help="Make Hugging Face checkpoints smaller, pass by pass, and gate the result.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich help costs 50 ms at every start
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


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
def init(
    model: CheckpointArgument,
    goal: Goal = "small",
    preset: InitPreset = None,
    max_bytes: MaxBytes = None,
    output: RecipeOutput = None,
    trust_remote_code: Trust = False,
    ignore_auto_map: IgnoreCode = False,
    allow_links: AllowLinks = False,
    offline: Offline = False,
) -> None:
    """Write a commented recipe for a model, chosen from its headers. Reads no weights."""
    from compress.cli.commands import begin

    code = Code(trust_remote_code, ignore_auto_map, allow_links)
    begin.init(model, goal=goal, preset=preset, max_bytes=max_bytes, output=output, code=code, offline=offline)


@app.command()
def run(
    recipe: RecipeOrModel,
    preset: PresetOption = None,
    output: OutputOption = None,
    sets: Sets = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run every stage again.")] = False,
    publish_anyway: PublishAnyway = False,
    shared: SharedOption = None,
    offline: Offline = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: apply its passes, evaluate the result, judge the gates.

    Exit status: 0 done and gates passed, 1 a gate failed, 2 bad recipe or input, 3 a gate was inconclusive,
    4 out of memory or disk, 70 a bug, 130 interrupted.
    """
    from compress.cli.commands import recipes

    recipes.run(
        recipe,
        sets or [],
        preset=preset,
        output=output,
        fresh=fresh,
        publish_anyway=publish_anyway,
        shared=shared,
        offline=offline,
        json=json,
        quiet=quiet,
    )


@app.command()
def check(
    recipes: RecipeFiles,
    sets: Sets = None,
    data: ReadData = False,
    resolved: Resolved = False,
    form: CheckFormat = None,
    json: AsJson = False,
) -> None:
    """Report every mistake in recipes at once, each with its line and a suggestion. Reads no weights."""
    from compress.cli.commands import recipes as commands

    commands.check(recipes, sets or [], data=data, resolved=resolved, json=json, form=form)


@app.command()
def plan(
    recipe: RecipeOrModel,
    preset: PresetOption = None,
    output: OutputOption = None,
    sets: Sets = None,
    minutes: Minutes = False,
    offline: Offline = False,
    json: AsJson = False,
) -> None:
    """Show the sizes, parameters, peak memory and disk space of every stage. Reads headers only."""
    from compress.cli.commands import recipes

    recipes.plan(recipe, sets or [], preset=preset, output=output, minutes=minutes, offline=offline, json=json)


@app.command()
def inspect(
    checkpoint: CheckpointArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="Print a row per tensor, equal ones apart.")] = False,
    zeros: Annotated[bool, typer.Option("--zeros", help="Read the weights and count zeros.")] = False,
    architecture: Annotated[
        bool, typer.Option("--architecture", help="Show blocks, roles of matrices, embeddings, head and ties instead.")
    ] = False,
    save: SaveRecord = None,
    trust_remote_code: Trust = False,
    ignore_auto_map: IgnoreCode = False,
    allow_links: AllowLinks = False,
    offline: Offline = False,
    json: AsJson = False,
) -> None:
    """Show what a checkpoint holds: parameters, bytes, and its tensors with dtype, storage and sparsity.

    Equal tensors of blocks and experts are one row.
    """
    from compress.cli.commands import checkpoints

    code = Code(trust_remote_code, ignore_auto_map, allow_links)
    if architecture or save is not None:
        checkpoints.architecture(checkpoint, save=save, code=code, offline=offline, json=json)
        return
    checkpoints.inspect(checkpoint, tensors=tensors, zeros=zeros, code=code, offline=offline, json=json)


@app.command()
def diff(
    compared: Compared,
    headers: Annotated[bool, typer.Option("--headers", help="Compare headers only, not values.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Print a row per tensor, equal ones apart.")] = False,
    trust_remote_code: Trust = False,
    ignore_auto_map: IgnoreCode = False,
    allow_links: AllowLinks = False,
    json: AsJson = False,
) -> None:
    """Show the config keys, blocks and tensors that differ between two checkpoints, or the figures of two or more runs.

    Knows blocks that were removed or added, and compares the others by their contents. Of runs (OUTPUT.run, a report.json,
    a trial of a sweep) it shows what was measured and the settings that differ. The exit status is 0 in any case.
    """
    from compress.cli.commands import checkpoints

    code = Code(trust_remote_code, ignore_auto_map, allow_links)
    checkpoints.diff(compared, values=not headers, tensors=tensors, code=code, json=json)


@app.command(name="eval")
def evaluate(
    checkpoint: CheckpointArgument,
    data: DataOption = None,
    field: Field = "text",
    template: Template = None,
    text: TextColumns = None,
    label: Label = None,
    baseline: Baseline = None,
    metric: Metrics = None,
    separator: Separator = None,
    window: Window = 256,
    stride: Stride = None,
    streaming: Streaming = False,
    max_documents: MaxDocuments = None,
    device: DeviceOption = "auto",
    dtype: Dtype = "float32",
    full_kv_cache: FullKvCache = False,
    confidence: Confidence = 0.95,
    trust_remote_code: Trust = False,
    ignore_auto_map: IgnoreCode = False,
    allow_links: AllowLinks = False,
    offline: Offline = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a checkpoint as a recipe would; with --baseline, compare it with another one."""
    from compress.cli.commands import quality

    quality.evaluate(
        checkpoint,
        data=data or (),
        metrics=metric or (),
        baseline=baseline,
        field=field,
        template=template,
        text=text,
        label=label,
        document_separator=separator,
        window=window,
        stride=stride,
        streaming=streaming,
        max_documents=max_documents,
        device=device,
        dtype=dtype,
        quantized_kv_cache=not full_kv_cache,
        confidence=confidence,
        code=Code(trust_remote_code, ignore_auto_map, allow_links),
        offline=offline,
        json=json,
        quiet=quiet,
    )


@app.command()
def gate(
    subject: Annotated[
        str, typer.Argument(help="The report.json of a run, or a checkpoint.", metavar="REPORT|CHECKPOINT")
    ],
    baseline: Annotated[
        Optional[str],
        typer.Option("--baseline", help="For a checkpoint: another checkpoint, or a file that `eval --json` wrote."),
    ] = None,
    recipe: Annotated[Optional[Path], typer.Option("--recipe", help="Use the gates of this recipe.")] = None,
    gates: Annotated[
        Optional[list[str]],
        typer.Option(
            "--gate", metavar="KEY=VALUE", help="A gate, such as bits_per_byte.max_increase=3%. May be repeated."
        ),
    ] = None,
    confidence: Annotated[
        Optional[float], typer.Option("--confidence", help="Confidence of the intervals.", min=0.5, max=0.9999)
    ] = None,
    junit: Annotated[
        Optional[Path], typer.Option("--junit", help="Write the verdicts to this file as JUnit XML.")
    ] = None,
    trust_remote_code: Trust = False,
    ignore_auto_map: IgnoreCode = False,
    allow_links: AllowLinks = False,
    offline: Offline = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Judge a report, or a checkpoint against a baseline.

    Exit status: 0 every gate passed, 1 a gate failed, 3 a gate was inconclusive.
    """
    from compress.cli.commands import quality

    quality.gate(
        subject,
        baseline=baseline,
        recipe=recipe,
        gates=gates or [],
        confidence=confidence,
        junit=junit,
        code=Code(trust_remote_code, ignore_auto_map, allow_links),
        offline=offline,
        json=json,
        quiet=quiet,
    )


@app.command(name="report")
def write_report(
    run_folder: Annotated[
        str, typer.Argument(help="A run folder (OUTPUT.run), the output itself, or a report.json.", metavar="RUN")
    ],
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="File to write: .html, .md, .svg or .xml (JUnit). By default report.html."),
    ] = None,
) -> None:
    """Render the report of a run again: the page, the Markdown, the main picture, or JUnit XML."""
    from compress.cli.commands import reports

    reports.report(run_folder, output)


@app.command(name="passes")
def list_passes(
    name: Annotated[Optional[str], typer.Argument(help="Name of a pass. By default all are listed.")] = None,
    json: AsJson = False,
) -> None:
    """List the passes, or explain every setting of one pass."""
    from compress.cli.commands import listing

    listing.passes_(name, json=json)


@app.command()
def schema(
    report: Annotated[bool, typer.Option("--report", help="Print the schema of reports instead.")] = False,
) -> None:
    """Print the JSON schema of recipes, which editors use for completion."""
    from compress.cli.commands import listing

    listing.schema(report=report)


@app.command()
def unpack(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Argument(help="Folder to write. It must not exist.", metavar="OUTPUT")],
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest size of one weight file.")] = "5GB",
    trust_remote_code: Trust = False,
    ignore_auto_map: IgnoreCode = False,
    allow_links: AllowLinks = False,
    quiet: Quiet = False,
) -> None:
    """Write a compact checkpoint as a dense stock checkpoint."""
    from compress.cli.commands import checkpoints

    code = Code(trust_remote_code, ignore_auto_map, allow_links)
    checkpoints.unpack(checkpoint, output, max_shard_size=max_shard_size, code=code, quiet=quiet)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder to search.", metavar="FOLDER")] = Path(), json: AsJson = False
) -> None:
    """List the run folders below a folder: status, stages, bytes, and files that killed processes left."""
    from compress.cli.commands import listing

    listing.runs(folder, json=json)


@app.command()
def clean(
    run_folder: Annotated[Path, typer.Argument(help="A run folder (OUTPUT.run), or the output itself.", metavar="RUN")],
    everything: Annotated[
        bool, typer.Option("--all", help="Remove the whole run folder, the report included.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be removed; remove nothing.")] = False,
) -> None:
    """Remove stages, caches and measurements that the last run did not use. The output stays."""
    from compress.cli.commands import listing

    listing.clean(run_folder, everything=everything, dry_run=dry_run)


for command in (export, sweep, fit):
    app.command()(command)
