"""Write the generated pages of docs/ from the code: schemas, passes, commands. `--check` fails where one is out of date."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def passes_page() -> str:
    """Every pass and setting, from the settings models."""
    from compress.passes.describe import describe_all

    lines = [
        "# Passes",
        "",
        "Made by `make docs` from the settings models; `compress passes NAME` prints the same.",
        "",
    ]
    for entry in describe_all()["passes"]:
        lines += [f"## `{entry['name']}`", "", f"{entry['summary']} {entry['details']}", ""]
        if entry["source"]:
            lines += [f"Source: {entry['source']}.", ""]
        needs = ", ".join(f"`data.{n}`" for n in entry["needs"]) or "no data"
        lines += [
            f"Works {entry['mode']}-wise, reads {needs}, preserves {', '.join(entry['preserves']) or 'nothing'}.",
            "",
        ]
        lines += ["| setting | type | default | what it does |", "|---|---|---|---|"]
        for s in entry["settings"]:
            default = "required" if s["required"] else f"`{json.dumps(s['default'])}`"
            cells = [f"`{s['name']}`", s["type"], default, s["description"]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def recipes_page() -> str:
    """Every key of a recipe, from the recipe's model."""
    from typing import get_args

    from compress.passes.describe import describe_settings
    from compress.recipe.model import Data, Gates, Recipe

    def rows(model: Any) -> list[str]:
        lines = ["| key | type | default | what it means |", "|---|---|---|---|"]
        for s in describe_settings(model):
            default = "required" if s["required"] else f"`{json.dumps(s['default'])}`" if s["type"] != "section" else ""
            cells = [f"`{s['name']}`", s["type"], default, s["description"]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return lines

    lines = [(HERE / "recipes_head.md").read_text(encoding="utf-8"), "## Keys", "", *rows(Recipe), ""]
    for title, sections in (("data", Data), ("gates", Gates)):
        lines += [f"## `{title}`", ""]
        for name, field in sections.model_fields.items():
            (inner,) = [t for t in get_args(field.annotation) if isinstance(t, type) and hasattr(t, "model_fields")]
            lines += [f"### `{title}.{name}`", "", field.description or "", "", *rows(inner), ""]
    return "\n".join(lines)


def commands_page() -> str:
    """Help of every command, at 100 columns."""
    environment = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}

    def text(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "compress", *arguments, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        body = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
        return body.replace("python -m compress", "compress")

    from compress.cli.app import app

    names = [c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands]
    lines = ["# Commands", "", "Made by `make docs` from the command line itself.", "", "```", text(), "```", ""]
    for name in names:
        lines += [f"## `compress {name}`", "", "```", text(name), "```", ""]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """File name ▶ text of every generated page."""
    from compress.recipe import recipe_schema
    from compress.report import report_schema

    return {
        "recipe.schema.json": json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n",
        "report.schema.json": json.dumps(report_schema(), indent=2, ensure_ascii=False) + "\n",
        "passes.md": passes_page(),
        "recipes.md": recipes_page(),
        "commands.md": commands_page(),
    }


def main() -> None:
    """Write the pages, or say which differ."""
    stale = []
    for name, text in pages().items():
        path = HERE / name
        if "--check" in sys.argv[1:]:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(name)
        else:
            path.write_text(text, encoding="utf-8")
    if stale:
        sys.exit(f"out of date: {', '.join(f'docs/{name}' for name in stale)}; run `make docs`")


if __name__ == "__main__":
    main()
