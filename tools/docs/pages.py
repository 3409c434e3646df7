"""Write what the documentation takes from the code: schemas, commands, recipe keys, settings of passes.

``python -m tools.docs.pages`` writes. ``--check`` fails if a page is out of date and writes nothing.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from tools.docs.attention import pictures
from tools.docs.picture import picture

DOCS = Path(__file__).resolve().parents[2] / "docs"

#: A new pass gets this page; prose is written between the two generated parts.
NEW_PASS = """# `{name}`

<!-- begin summary -->
<!-- end summary -->

## Settings

<!-- begin settings -->
<!-- end settings -->
"""


def main() -> None:
    """Write the pages, or with ``--check`` name those that are out of date and exit with status 1."""
    stale = []
    for path, text in pages().items():
        if "--check" in sys.argv[1:]:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(str(path.relative_to(DOCS.parent)))
        else:
            path.write_text(text, encoding="utf-8")
    if stale:
        sys.exit(f"out of date: {', '.join(stale)}; run `python -m tools.docs.pages`")


def pages() -> dict[Path, str]:
    """Return the text of each page that is generated, in whole or in part, by its path."""
    from compress.passes.describe import describe_all
    from compress.recipe import recipe_schema
    from compress.report import report_schema

    passes = describe_all()["passes"]
    return {
        DOCS.parent / "compress" / "recipe" / "recipe.schema.json": json.dumps(
            recipe_schema(), indent=2, ensure_ascii=False
        )
        + "\n",
        DOCS / "report.schema.json": json.dumps(report_schema(), indent=2, ensure_ascii=False) + "\n",
        DOCS / "architecture.svg": picture(),
        **{DOCS / "_static" / name: text for name, text in pictures().items()},
        DOCS / "commands.md": commands_page(),
        DOCS / "reference.md": reference_page(),
        DOCS / "decisions" / "index.md": decisions_page(),
        DOCS / "passes" / "index.md": passes_page(passes),
        **{DOCS / "passes" / f"{entry['name']}.md": pass_page(entry) for entry in passes},
    }


def decisions_page() -> str:
    """Return the list of decisions by their titles."""
    lines = [
        "# Decisions",
        "",
        "Each page has one question, what was tried with its figures, and what was chosen. What lost is kept here, so that",
        "nobody has to try it again.",
        "",
    ]
    for path in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        title = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join([*lines, ""])


def passes_page(passes: list[dict[str, Any]]) -> str:
    """Return the list of passes: name, what it does, which data it reads."""
    rows = [
        [f"[`{p['name']}`]({p['name']}.md)", p["summary"], ", ".join(f"`{n}`" for n in p["needs"]) or "none"]
        for p in passes
    ]
    return "\n".join(
        [
            "# Passes",
            "",
            "A pass reads a checkpoint and writes a smaller one. A recipe lists passes in the order in which they run.",
            "`compress passes` prints this list, `compress passes NAME` the settings of one pass.",
            "",
            *table(["pass", "what it does", "data that it reads"], rows),
            "",
            "Every pass also takes `only` and `skip` (module patterns) and `allow_noop`.",
            "",
        ]
    )


def pass_page(entry: dict[str, Any]) -> str:
    """Return the page of a pass with its generated parts renewed; the prose around them stays."""
    path = DOCS / "passes" / f"{entry['name']}.md"
    text = path.read_text(encoding="utf-8") if path.exists() else NEW_PASS.format(name=entry["name"])
    sample = ["", "```yaml", *entry["sample"].splitlines(), "```"] if entry["sample"] else []
    text = put(text, "summary", [f"{entry['summary']} {entry['details']}", *sample])
    needs = ", ".join(f"`data.{n}`" for n in entry["needs"]) or "no data"
    return put(
        text,
        "settings",
        [
            f"Mode: {entry['mode']}. Data: {needs}.",
            *(["", f"Sources: {entry['source']}."] if entry["source"] else []),
            "",
            *settings_table(entry["settings"], "setting"),
        ],
    )


def put(text: str, part: str, lines: list[str]) -> str:
    """Return ``text`` with the lines between ``<!-- begin part -->`` and ``<!-- end part -->`` replaced."""
    begin, end = f"<!-- begin {part} -->", f"<!-- end {part} -->"
    if begin not in text or end not in text:
        raise SystemExit(f"a page of a pass lacks {begin} or {end}; put both where the generated part belongs")
    body = "\n".join([begin, "", *lines, "", end])
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: body, text, count=1, flags=re.DOTALL)


def reference_page() -> str:
    """Return every key of a recipe, from the recipe's model."""
    from compress.passes.describe import describe_settings
    from compress.recipe.data import Data
    from compress.recipe.fit import Bound
    from compress.recipe.gates import Gates
    from compress.recipe.messages import models_in
    from compress.recipe.model import Recipe
    from compress.recipe.renamed import rows
    from compress.recipe.sweep import Sweep

    lines = [
        "# Recipe keys",
        "",
        "Every key of a recipe. [Recipes](recipes.md) explains how they work together,",
        "[passes](passes/index.md) has the settings of each pass.",
        "`compress schema` prints the same as JSON schema.",
        "",
        "## Top level",
        "",
        *settings_table(describe_settings(Recipe), "key"),
        "",
    ]
    for title, sections in (("data", Data), ("gates", Gates)):
        lines += [f"## `{title}`", ""]
        for name, field in sections.model_fields.items():
            (inner,) = models_in(field.annotation)
            lines += [f"### `{title}.{name}`", "", field.description or "", ""]
            lines += [*settings_table(describe_settings(inner), "key"), ""]
    lines += [
        "## `fit`",
        "",
        "A bound that a [search](fit.md) keeps.",
        "",
        *settings_table(describe_settings(Bound), "key"),
        "",
        "## `sweep`",
        "",
        "Goals of a [sweep](sweeps.md).",
        "",
        *settings_table(describe_settings(Sweep), "key"),
        "",
    ]
    lines += ["## Renamed keys", "", "Old spellings are refused; the error shows the new one.", ""]
    of_passes = [(", ".join(f"`{name}`" for name in sections if name) or "recipe", o, n) for sections, o, n in rows()]
    lines += table(["where", "old", "new"], [[where, f"`{old}`", f"`{new}`"] for where, old, new in of_passes])
    return "\n".join([*lines, ""])


def settings_table(settings: list[dict[str, Any]], title: str) -> list[str]:
    """Return a table of settings: name, type, default, meaning."""
    rows = []
    for s in settings:
        default = "required" if s["required"] else "" if s["type"] == "section" else f"`{json.dumps(s['default'])}`"
        rows.append([f"`{s['name']}`", s["type"], default, s["description"]])
    return table([title, "type", "default", "meaning"], rows)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table; ``|`` in a cell is escaped."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *escaped)]


def commands_page() -> str:
    """Return the help of every command, at 100 columns."""
    os.environ.update({"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"})
    from compress.cli.app import app

    def text(*arguments: str) -> str:
        printed = io.StringIO()
        with redirect_stdout(printed), suppress(SystemExit):
            app([*arguments, "--help"], prog_name="compress")
        return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())

    names = [c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands]
    lines = ["# Commands", "", "The help of each command, as `compress COMMAND --help` prints it.", ""]
    lines += ["```text", text(), "```", ""]
    for name in names:
        lines += [f"## `compress {name}`", "", "```text", text(name), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
