"""The README of a compressed checkpoint: base model, results, recipe, how to load it, and the original card.

It has no times and no absolute paths, so that the same recipe gives the same text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from compress.escape import fence, in_one_line, markdown, quoted
from compress.report import figures
from compress.report.markdown import before_after_table, waterfall_table
from compress.spec.classes import auto_class

#: Most characters of front matter; typical front matter has one or two thousand.
_LONGEST = 100_000
_FRONT = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)


def model_card(
    report: Mapping[str, Any],
    original: str | None,
    *,
    compact: bool,
    base_model: str,
    recipe_yaml: str,
    class_name: str | None = None,
    loading: Sequence[str] = (),
) -> str:
    """Markdown with Hugging Face front matter.

    Args:
        original: README of the base model. Its front matter (licence, language, data) is kept; its text is appended.
        compact: whether loading needs ``trust_remote_code=True``.
        base_model: hub id, optionally with @revision, or name of a folder. class_name: stock class, which determines how
            to load it. loading: sentences on what loading needs besides torch and transformers.
    """
    base_model, _, revision = base_model.partition("@")
    front, body = _split(original or "")
    chain = " ▶ ".join(f"`{row['name']}`" for stage in report["stages"] for row in stage["passes"])
    title = report["output"].replace("\\", "/").rstrip("/").rpartition("/")[2]
    lines = [markdown(f"# {in_one_line(title)}"), ""]
    linked = re.fullmatch(r"[\w.-]+/[\w.-]+", base_model, re.ASCII) is not None
    lines += [f"[{base_model}](https://huggingface.co/{base_model})" if linked else f"`{in_one_line(base_model)}`"]
    lines[-1] += f"{f' at revision `{revision}`' if revision else ''}, made smaller by {chain}."
    lines[-1] = markdown(in_one_line(lines[-1]))
    lines += [
        "",
        *_loading(title, compact, class_name, loading),
        "",
        "## Results",
        "",
        *before_after_table(report, timed=False),
        "",
    ]
    if note := figures.quality_note(report):
        lines += [markdown(in_one_line(f"Measured on {note}.")), ""]
    lines += ["## Bytes saved and quality lost by each pass", "", *waterfall_table(report, seconds=False), ""]
    lines = ["---", _front(front, base_model).rstrip("\n"), "---", "", *lines]
    around = fence(recipe_yaml)
    lines += ["## Recipe", "", f"{around}yaml", recipe_yaml.rstrip("\n"), around, ""]
    if body.strip():
        lines += ["## The base model's card", "", _demoted(body).strip(), ""]
    return "\n".join(lines)


def _front(original: Mapping[str, Any], base_model: str) -> str:
    """Front matter as YAML: the original's, updated. If the original's cannot be dumped, only the updates."""
    tags = original.get("tags")
    tags = [*(tag for tag in (tags if isinstance(tags, list) else []) if isinstance(tag, str)), "compressed"]
    ours = {"base_model": base_model, "library_name": "transformers", "tags": list(dict.fromkeys(tags))}
    try:
        return _yaml({**original, **ours})
    except Exception:  # some values load but do not dump
        return _yaml(ours)


def _loading(title: str, compact: bool, class_name: str | None, notes: Sequence[str]) -> list[str]:
    auto = auto_class(class_name)
    trust = ", trust_remote_code=True" if compact else ""
    lines = ["```python", f"from transformers import {auto}", ""]
    lines += [f"model = {auto}.from_pretrained({quoted(title)}{trust})", "```"]
    for note in notes:
        lines += ["", f"{note[0].upper()}{note[1:]}."]
    if compact:
        lines += [
            "",
            "The weights are stored compactly. The bundled `modeling_compress.py`, which needs only torch and transformers, "
            "decodes them into the stock class when the model is loaded; `compress unpack` writes them as a stock checkpoint.",
        ]
    return lines


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and the remaining text; invalid front matter counts as text."""
    from ruamel.yaml import YAML

    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    match = _FRONT.match(text)
    if match and len(match[1]) <= _LONGEST:
        try:
            data = YAML(typ="safe", pure=True).load(match[1])
        except Exception:  # hostile YAML breaks the library in many ways, and a result must not be lost for its card
            data = None
        if isinstance(data, dict):
            return data, text[match.end() :]
        if data is None and not match[1].strip():
            return {}, text[match.end() :]
    return {}, text


def _yaml(data: Mapping[str, Any]) -> str:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.representer.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(dict(data), stream)
    return stream.getvalue()


def _demoted(text: str) -> str:
    """The text with headings two levels lower; code blocks stay."""
    lines, fenced = [], False
    for line in text.split("\n"):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        if not fenced and (match := re.match(r"(#{1,6}) ", line)):
            line = "#" * min(len(match[1]) + 2, 6) + line[len(match[1]) :]
        lines.append(line)
    return "\n".join(lines)
