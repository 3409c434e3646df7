"""Mistakes and failed gates for machines: commands of GitHub workflows, and SARIF 2.1.0."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import CompressError, Mistake, RecipeError
from compress.escape import printable

SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def on_github() -> bool:
    """Whether a workflow of GitHub runs this process."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def mistakes_of(error: CompressError, recipe: str | None = None) -> list[Mistake]:
    """The mistakes of an error; one in the recipe without a line where its place is not known."""
    if isinstance(error, RecipeError) and error.mistakes:
        return list(error.mistakes)
    return [Mistake(f"{error.where}: {error.what}" if error.where else error.what, error.fix or "", recipe)]


def github(mistakes: Sequence[Mistake]) -> list[str]:
    """A line per mistake that GitHub shows at its place: ``::error file=…,line=…,col=…::…``."""
    lines = []
    for mistake in mistakes:
        where: dict[str, Any] = {}
        if mistake.file is not None and Path(mistake.file).exists():
            where["file"] = _in_workspace(mistake.file)
            if mistake.line:
                where |= {"line": mistake.line, "col": mistake.column}
                where["endColumn"] = mistake.column + max(mistake.width, 1)
        lines.append(_command(where, "; ".join(filter(None, (mistake.message, mistake.fix)))))
    return lines


def github_gates(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per gate that did not pass."""
    return [
        _command({"title": f"gate {row['gate']}"}, row["text"], "error" if row["verdict"] == "fail" else "warning")
        for row in gates
        if row["verdict"] != "pass"
    ]


def _command(properties: Mapping[str, Any], message: str, kind: str = "error") -> str:
    """A workflow command; what would end a property or the line is escaped."""
    escaped = [
        f"{key}={_data(str(value)).replace(':', '%3A').replace(',', '%2C')}" for key, value in properties.items()
    ]
    return f"::{kind}{' ' if escaped else ''}{','.join(escaped)}::{_data(message)}"


def _data(text: str) -> str:
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return printable(text)


def _in_workspace(file: str) -> str:
    """A path as the workflow's repository has it."""
    path, root = Path(file).resolve(), Path(os.environ.get("GITHUB_WORKSPACE") or ".").resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else Path(file).as_posix()


def sarif(mistakes: Sequence[Mistake]) -> str:
    """The mistakes as SARIF 2.1.0, one run of this tool; without mistakes a run without results."""
    import json

    from compress import __version__

    rule = {"id": "recipe", "shortDescription": {"text": "A recipe that cannot run"}}
    run = {
        "tool": {"driver": {"name": "compress", "version": __version__, "rules": [rule]}},
        "columnKind": "unicodeCodePoints",
        "results": [_result(mistake) for mistake in mistakes],
    }
    return json.dumps({"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1)


def _result(mistake: Mistake) -> dict[str, Any]:
    text = "; ".join(filter(None, (mistake.message, mistake.fix)))
    result: dict[str, Any] = {"ruleId": "recipe", "level": "error", "message": {"text": text}}
    if mistake.file is None or not Path(mistake.file).exists():
        return result
    place: dict[str, Any] = {"artifactLocation": {"uri": _uri(mistake.file)}}
    if mistake.line:
        end = mistake.column + max(mistake.width, 1)
        place["region"] = {"startLine": mistake.line, "startColumn": max(mistake.column, 1), "endColumn": end}
    return {**result, "locations": [{"physicalLocation": place}]}


def _uri(file: str) -> str:
    from urllib.parse import quote

    name = _in_workspace(file)
    return Path(name).as_uri() if Path(name).is_absolute() else quote(name)
