"""A fitted recipe as commented YAML, in block style, with its schema in the first line."""

from __future__ import annotations

import io
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.data.default_text import DEFAULT
from compress.formatting import format_bytes
from compress.presets.fit import Fitted

SCHEMA = Path(__file__).resolve().parents[1] / "recipe" / "recipe.schema.json"
_WIDTH = 100
_MINE = "Name a file of your own, of what the model will read; "
_COMMENTS = {
    "calibration": "Text that passes measure the model on. "
    + _MINE
    + "`default` is English that comes with the package.",
    "training": "Text to train on. " + _MINE + "`default` is a small one, English, that comes with the package.",
    "evaluation": "Text that original and result are compared on; no pass may see it.",
}


def rendered(fitted: Fitted, command: str, folder: Path) -> str:
    """The text of the recipe.

    Args:
        command: that made it. folder: where it is written, from which the schema is named.
    """
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 2**16
    stream = io.StringIO()
    yaml.dump(_commented(fitted), stream)
    head = [f"# yaml-language-server: $schema={_schema(folder)}", *_comment(about(fitted, command), 0)]
    return "\n".join(head) + "\n" + stream.getvalue()


def about(fitted: Fitted, command: str) -> str:
    """Sentences on the checkpoint."""
    facts, size = fitted.facts, fitted.plan.original
    text = f"Made by `{command}`. {facts.class_name}: {size.parameters:,} parameters, {format_bytes(size.bytes)}"
    if facts.map.known and facts.map.depth:
        text += f", {facts.map.depth} blocks"
    if facts.table_bytes and facts.reads_text:
        tables = "the table of tokens, which is the head too, has" if facts.map.tied else "tables of tokens have"
        share = facts.table_bytes / max(1, size.bytes)
        text += f"; {tables} {format_bytes(facts.table_bytes)} ({share:.0%})"
    return text + "."


def _schema(folder: Path) -> str:
    """The schema's place as editors read it: relative where recipe and package are in one tree, else absolute."""
    try:
        inside = SCHEMA.is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(SCHEMA.parents[2])
    except OSError:
        inside = False
    return Path(os.path.relpath(SCHEMA, folder.resolve())).as_posix() if inside else SCHEMA.as_uri()


def _commented(fitted: Fitted) -> Any:
    root = _tree(fitted.mapping)
    if fitted.draft.store == "compact":
        text = "A checkpoint that brings its own modelling file: smaller, and not for vLLM. `stock` is what every loader reads."
        _put(root, "store", text, 0)
    for name, section in root.get("data", {}).items():
        text = _COMMENTS[name]
        if DEFAULT not in section["files"]:
            text = text.replace(_MINE, "").partition(" `default`")[0]
        _put(root["data"], name, text, 2)
    for index, (note, planned) in enumerate(zip(fitted.draft.notes, _planned(fitted), strict=True)):
        _put(root["passes"], index, f"{note[:1].upper()}{note[1:].rstrip('.')}. {planned}", 2)
    if "gates" in root:
        text = "The result is published if it keeps these bounds."
        if list(root["gates"]) == ["size"]:
            text += f" {_lacking(fitted)}"
        _put(root, "gates", text, 0)
    return root


def _planned(fitted: Fitted) -> list[str]:
    """Bytes before and after each pass, by the plan."""
    before, result = fitted.plan.original.bytes, []
    for stage in fitted.plan.stages:
        for planned in stage.passes:
            about = "" if planned.spec.exact else "about "
            result.append(f"{format_bytes(before)} ▶ {about}{format_bytes(planned.size.bytes)}.")
            before = planned.size.bytes
    return result


def _lacking(fitted: Fitted) -> str:
    """How to measure a model that plain text does not."""
    facts = fitted.facts
    if facts.task is not None and "images" in facts.task.takes:
        return "To measure accuracy add data: `evaluation: {images: FOLDER}`, a folder of images for each class."
    if facts.task is not None and facts.task.labels == "classes":
        return "To measure accuracy add data: `evaluation: {files: [FILE], text: COLUMN, label: COLUMN}`."
    if facts.task is not None and not facts.evaluated:
        what = "tokenizer has no mask token" if facts.reads_text else "folder has no tokenizer"
        return f"The {what}, so nothing is measured on text."
    return "No metric measures this class: compare the result with your own means."


def _tree(value: Any) -> Any:
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    if isinstance(value, Mapping):
        return CommentedMap({key: _tree(item) for key, item in value.items()})
    if isinstance(value, Sequence) and not isinstance(value, str):
        return CommentedSeq([_tree(item) for item in value])
    return value


def _comment(text: str, indent: int) -> list[str]:
    """Lines of a comment; a number stays with its unit."""
    joined = re.sub(r"(?<=\d) (?=[kMGT]?B\b)", "\N{NO-BREAK SPACE}", text)
    lines = textwrap.wrap(joined, _WIDTH - indent, break_long_words=False, break_on_hyphens=False)
    return [f"# {line}".replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _put(node: Any, key: str | int, text: str, indent: int) -> None:
    lines = [line.removeprefix("# ") for line in _comment(text, indent)]
    node.yaml_set_comment_before_after_key(key, before="\n".join(lines), indent=indent)
