"""The command ``fit`` and its options."""

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.options import AsJson, MaxBytes, Offline, OutputOption, Quiet, Sets

BoundOrModel = Annotated[
    Path, typer.Argument(help="Recipe (YAML) with a section `fit`, or a model.", metavar="RECIPE|MODEL")
]
MaxRatio = Annotated[
    str | None, typer.Option("--max-ratio", help="Most bytes as a share of the original's.", metavar="20%")
]
MaxIncrease = Annotated[
    str | None,
    typer.Option("--max-increase", help="Largest increase of bits per byte, a gate on the result.", metavar="1%"),
]
FitFamilies = Annotated[
    str | None,
    typer.Option(
        "--families",
        help="What may be given up besides bits, by default all: depth, width, kv_heads, sharing, sparsity, embeddings, "
        "trellis.",
        metavar="NAME,…",
    ),
]
FitStore = Annotated[
    str | None,
    typer.Option(
        "--store", help="compact: removed weights and tables of tokens get smaller too.", metavar="stock|compact"
    ),
]
CalibrationText = Annotated[
    Path | None, typer.Option("--text", help="Text to calibrate on, of a model without a recipe.", metavar="FILE")
]
FitTokens = Annotated[
    int | None, typer.Option("--tokens", help="Tokens of distillation where weights were removed or shared.")
]
OnlySearch = Annotated[
    bool, typer.Option("--only-search", help="Write the recipe of the best combination; do not run it.")
]
FitFresh = Annotated[bool, typer.Option("--fresh", help="Measure everything again.")]


def fit(
    target: BoundOrModel,
    max_bytes: MaxBytes = None,
    max_ratio: MaxRatio = None,
    max_increase: MaxIncrease = None,
    output: OutputOption = None,
    families: FitFamilies = None,
    store: FitStore = None,
    text: CalibrationText = None,
    tokens: FitTokens = None,
    sets: Sets = None,
    only_search: OnlySearch = False,
    fresh: FitFresh = False,
    offline: Offline = False,
    json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find the best model within a bound on bytes: blocks, neurons, heads, sharing, sparsity and bits together.

    The folder OUTPUT.fit holds what trials measured and the recipe of the best combination (`recipe.yaml`). A search that
    was stopped goes on with the same command.

    Exit status: 0 done and gates passed, 1 a gate failed, 2 bad recipe, bound or input, 3 a gate was inconclusive,
    4 out of memory or disk, 70 a bug, 130 interrupted.
    """
    from compress.cli.commands import fit as commands

    bound = {"max_bytes": max_bytes, "max_ratio": max_ratio, "max_increase": max_increase, "tokens": tokens}
    bound["families"] = None if families is None else f"[{families}]"
    commands.fit(
        target,
        sets or [],
        bound={key: str(value) for key, value in bound.items() if value is not None},
        output=output,
        store=store,
        text=text,
        only_search=only_search,
        fresh=fresh,
        offline=offline,
        json=json,
        quiet=quiet,
    )
