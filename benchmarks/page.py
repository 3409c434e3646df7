"""docs/benchmarks.md: one section for each benchmark, replaced when that one is run."""

from __future__ import annotations

import argparse
import os
import platform
import re
import time
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
HEAD = "# Benchmarks\n\nEach section is written by the command it names. Shared machines are noisy: read the ratios.\n"


def environment() -> str:
    """What the figures were measured on."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.machine())
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "safetensors"))
    cores = len(os.sched_getaffinity(0))
    return f"{time.strftime('%Y-%m-%d')}, {cpu}, {cores} cores, Python {platform.python_version()}, {packages}."


#: Options that are variables of `make`.
_VARIABLES = ("model", "train", "heldout", "reference")


def command(target: str, parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command line that these arguments came from, files by their names alone."""
    variables, rest = [], []
    for key, value in vars(args).items():
        if value == parser.get_default(key):
            continue
        words = " ".join(Path(str(v)).name for v in (value if isinstance(value, list) else [value]))
        if key in _VARIABLES:
            variables.append(f"{key.upper()}=" + (f'"{words}"' if " " in words else words))
        else:
            rest.append(f"--{key} {words}")
    return " ".join(["make", target, *variables, *([f'ARGS="{" ".join(rest)}"'] if rest else [])])


def put(section: str, rows: list[str]) -> None:
    """Put the rows into the section of that name; other sections stay, and no title is used twice."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else HEAD
    begin, end = f"<!-- begin {section} -->", f"<!-- end {section} -->"
    others = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", "", text, flags=re.DOTALL).splitlines()
    rows = [f"{row} ({section})" if row.startswith("## ") and row in others else row for row in rows]
    body = "\n".join([begin, "", *rows, "", end])
    if begin in text:
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: body, text, flags=re.DOTALL)
    else:
        text = f"{text.rstrip()}\n\n{body}\n"
    PAGE.write_text(text, encoding="utf-8")


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def deliver(section: str, rows: list[str]) -> None:
    """Put the rows into the page, or print them for the section ``-``."""
    if section == "-":
        print("\n".join(rows))
    else:
        put(section, rows)
