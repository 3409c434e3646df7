"""Help of the command line: commands in groups with whole summaries, examples, and what a wrong word probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from typer.core import TyperGroup

from compress.errors import CompressError

#: Groups of commands by the job they do.
GROUPS = {
    "Recipes": ("init", "check", "plan", "run", "sweep", "fit"),
    "Quality": ("eval", "gate", "report"),
    "Checkpoints": ("inspect", "diff", "unpack", "export"),
    "Reference": ("passes", "schema"),
    "Run folders": ("runs", "clean"),
}

#: Examples of the whole and of each command.
EXAMPLES = {
    "": (
        "compress init MODEL -o recipe.yaml",
        "compress check recipe.yaml && compress plan recipe.yaml",
        "compress run recipe.yaml",
    ),
    "init": ("compress init MODEL -o recipe.yaml", "compress init MODEL --goal accurate --max-bytes 500MB"),
    "run": (
        "compress run recipe.yaml",
        "compress run recipe.yaml --set passes.0.cast.weights=int8 \\\n      --set output=out/int8",
        "compress run --preset W4A16 MODEL -o out/model-w4a16",
    ),
    "fit": (
        "compress fit MODEL --max-bytes 200MB --max-increase 1%",
        "compress fit MODEL --max-ratio 10% --store compact --tokens 2000000 -o out/small",
        "compress fit fit.yaml --only-search",
    ),
    "sweep": (
        "compress sweep sweep.yaml",
        "compress sweep sweep.yaml --workers 2",
        "compress sweep --join out/model.sweep",
    ),
    "check": ("compress check recipe.yaml", "compress check recipe.yaml --data --format github"),
    "plan": ("compress plan recipe.yaml --minutes",),
    "eval": (
        "compress eval MODEL --data valid.txt --json > baseline.json",
        "compress eval out/model --data valid.txt --baseline MODEL --metric kl",
    ),
    "gate": (
        "compress gate out/model.run/report.json --gate size.max_ratio=50%",
        "compress gate out/model --baseline baseline.json \\\n      --gate bits_per_byte.max_increase=3% --junit gate.xml",
    ),
    "report": ("compress report out/model -o report.html",),
    "inspect": ("compress inspect MODEL", "compress inspect MODEL --tensors --zeros"),
    "diff": ("compress diff MODEL out/model", "compress diff out/a.run out/b.run out/c.run"),
    "unpack": ("compress unpack out/model out/dense",),
    "export": (
        "compress export out/model --to gguf -o out/model.gguf",
        "compress export MODEL --to gguf -o model-q4_k.gguf --type Q4_K \\\n      --imatrix out/model.imatrix.gguf",
    ),
    "passes": ("compress passes", "compress passes cast"),
    "schema": ("compress schema > recipe.schema.json",),
    "runs": ("compress runs out",),
    "clean": ("compress clean out/model.run --dry-run",),
}


class GroupedHelp(TyperGroup):
    """The commands; help shows them in groups."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.epilog = _examples("")
        for name, command in self.commands.items():
            command.epilog = _examples(name)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that the first argument names. Raises `CompressError` with the one that was probably meant."""
        if args[0] not in self.commands and not args[0].startswith("-") and not ctx.resilient_parsing:
            meant = _meant(args[0], list(self.commands), WORDS)
            raise CompressError(f"there is no command `{args[0]}`", fix=f"{meant}`compress --help` lists the commands")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each group with the first sentence of every command, wrapped and never cut."""
        grouped = {name for names in GROUPS.values() for name in names}
        others = tuple(name for name in self.commands if name not in grouped)
        width = max(map(len, self.commands))
        for title, names in {**GROUPS, "Others": others}.items():
            rows = [(name.ljust(width), _summary(self.commands[name])) for name in names if name in self.commands]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _summary(command: Any) -> str:
    """The first sentence of a command's help."""
    paragraph = " ".join((command.help or "").partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].removesuffix(".") + "."


def _examples(name: str) -> str | None:
    lines = EXAMPLES.get(name)
    return None if lines is None else "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def usage_error(error: Any) -> str:
    """One line for a mistake in the arguments: what is wrong, the word that was probably meant, where help is."""
    context = error.ctx
    names = [] if context is None else context.command_path.split()[1:]
    where = f"`{' '.join(['compress', *names])} --help` shows what there is"
    if (option := getattr(error, "option_name", None)) is not None and context is not None:
        options = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
        if option not in options:
            subject = f"`{' '.join(names) or 'compress'}` has no option `{option}`"
            return f"{subject}; {_meant(option, [*options, '--help'])}{where}"
    message = error.format_message().rstrip(".")
    return f"{message[:1].lower()}{message[1:]}; {where}"


#: Words of other tools ▶ commands.
WORDS = {
    "evaluate": "eval",
    "measure": "eval",
    "validate": "check",
    "lint": "check",
    "dry-run": "plan",
    "show": "inspect",
    "info": "inspect",
    "compare": "diff",
    "list": "runs",
    "ls": "runs",
    "new": "init",
    "template": "init",
    "decompress": "unpack",
    "html": "report",
    "quantize": "run",
    "prune": "run",
    "oneshot": "run",
    "apply": "run",
    "search": "sweep",
    "tune": "sweep",
    "optimize": "sweep",
    "convert": "export",
    "gguf": "export",
    "onnx": "export",
}


def _meant(word: str, names: Sequence[str], words: dict[str, str] | None = None) -> str:
    known = (words or {}).get(word.lower())
    close = [known] if known else difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`? " if close else ""
