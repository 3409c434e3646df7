"""The command ``sweep`` and its options."""

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.options import AsJson, Quiet, Sets

SweepRecipe = Annotated[
    Path | None, typer.Argument(help="Recipe with values to search and a section `sweep`.", metavar="RECIPE")
]
Join = Annotated[
    Path | None,
    typer.Option(
        "--join", help="Take part in a sweep that has begun, on any machine that sees its folder.", metavar="DIR"
    ),
]
Workers = Annotated[int, typer.Option("--workers", help="Processes that run trials at the same time.", min=1)]
Submit = Annotated[
    str | None,
    typer.Option("--submit", help="Start the workers as jobs of submitit instead.", metavar="slurm|local"),
]
SubmitOption = Annotated[
    list[str] | None,
    typer.Option(
        "--submit-option", help="Of submitit, such as slurm_partition=gpu. May be repeated.", metavar="KEY=VALUE"
    ),
]


def sweep(
    recipe: SweepRecipe = None,
    sets: Sets = None,
    join: Join = None,
    workers: Workers = 1,
    submit: Submit = None,
    submit_option: SubmitOption = None,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe with many values, and show those that no other beats: the smallest at each quality.

    The folder OUTPUT.sweep holds the trials, the recipes of the front (`front/`) and a page (`sweep.html`). A sweep that
    was stopped goes on with the same command.

    Exit status: 0 there is a front, 1 a gate failed in every trial, 2 bad recipe or input, 3 no trial passed and some gates
    were inconclusive, 4 out of memory or disk, 70 a bug, 130 interrupted.
    """
    from compress.cli.commands import sweep as commands

    commands.sweep(
        recipe,
        sets or [],
        join=join,
        workers=workers,
        submit=submit,
        submit_options=submit_option or [],
        json=json,
        quiet=quiet,
    )
