"""docs/benchmarks.md: one section for each benchmark, replaced when that one is run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

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
_VARIABLES = ("model", "train", "heldout", "reference", "peer")


def command(target: str, parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command line that these arguments came from, files by their names alone."""
    variables, rest = [], []
    for key, value in vars(args).items():
        if value == parser.get_default(key):
            continue
        named = model_name if key == "model" else lambda v: Path(str(v)).name
        words = " ".join(named(v) for v in (value if isinstance(value, list) else [value]))
        if key in _VARIABLES:
            variables.append(f"{key.upper()}=" + (f'"{words}"' if " " in words else words))
        else:
            rest.append(f"--{key} {words}")
    return " ".join(["make", target, *variables, *([f'ARGS="{" ".join(rest)}"'] if rest else [])])


def model_name(model: str | Path) -> str:
    """Name of a model in titles: its folder's, or that of the folder around one called ``model``."""
    path = Path(model).resolve()
    return path.parent.name if path.name == "model" else path.name


def peers_file(model: str | Path) -> Path:
    """Where figures of other tools on a model are kept; see `benchmarks.peers`."""
    return Path(__file__).resolve().parent / f"peers_{model_name(model)}.json"


def known_peers(model: str | Path) -> list[dict[str, Any]]:
    """Figures of other tools: ``tool``, ``method``, ``amount``, ``rise`` of the loss, and what else was measured."""
    file = peers_file(model)
    return json.loads(file.read_text()) if file.exists() else []


def keep_peer(model: str | Path, row: dict[str, Any]) -> None:
    """Keep figures of another tool, in place of those of the same job."""
    known = [one for one in known_peers(model) if any(one[key] != row[key] for key in ("tool", "method", "amount"))]
    lines = ",\n".join(f" {json.dumps(one, ensure_ascii=False)}" for one in [*known, row])
    peers_file(model).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def others(model: str | Path, amount: str, method: str | None = None) -> str:
    """Entry of the column "others": ΔNLL and KL of other tools for an amount such as ``50%``, of all methods or of one."""
    shown = []
    for row in known_peers(model):
        first = row["method"].split()[0]
        if row["amount"] == amount and method in (None, first.lower()):
            tool = row["tool"] if first in row["tool"] else f"{row['tool']} {row['method']}"
            shown.append(f"{tool} {row['rise']:.4f}" + (f" (KL {row['kl']:.4f})" if "kl" in row else ""))
    return ", ".join(shown)


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
