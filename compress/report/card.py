"""The README of a compressed checkpoint: base model, results, recipe, how to load it, and the original card.

It holds neither times nor absolute paths, so that the same recipe gives the same text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

from compress.checkpoint.bundle import auto_class
from compress.report import figures
from compress.report.markdown import before_after_table, waterfall_table

_FRONT = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)


def model_card(
    report: Mapping[str, Any],
    original: str | None,
    *,
    compact: bool,
    base_model: str,
    recipe_yaml: str,
    class_name: str | None = None,
) -> str:
    """Markdown with Hugging Face front matter.

    Args:
        original: the base model's README, whose front matter (licence, language, data) is kept and whose text follows.
        compact: whether loading needs ``trust_remote_code=True``.
        base_model: a hub id (with @revision or not), or a folder's name. class_name: of the stock class, which tells how
            to load it.
    """
    base_model, _, revision = base_model.partition("@")
    front, body = _split(original or "")
    tags = front.get("tags")
    tags = [*(tags if isinstance(tags, list) else []), "compressed"]
    front |= {"base_model": base_model, "library_name": "transformers", "tags": list(dict.fromkeys(tags))}
    chain = " ▶ ".join(f"`{row['name']}`" for stage in report["stages"] for row in stage["passes"])
    title = report["output"].replace("\\", "/").rstrip("/").rpartition("/")[2]
    lines = ["---", _yaml(front).rstrip("\n"), "---", "", f"# {title}", ""]
    lines += [f"[{base_model}](https://huggingface.co/{base_model})" if "/" in base_model else f"`{base_model}`"]
    lines[-1] += f"{f' at revision `{revision}`' if revision else ''}, made smaller by {chain}."
    lines += [
        "",
        *_loading(title, compact, class_name),
        "",
        "## Results",
        "",
        *before_after_table(report, timed=False),
        "",
    ]
    if note := figures.quality_note(report):
        lines += [f"Measured on {note}.", ""]
    lines += ["## What each pass saved and cost", "", *waterfall_table(report, seconds=False), ""]
    lines += ["## Recipe", "", "```yaml", recipe_yaml.rstrip("\n"), "```", ""]
    if body.strip():
        lines += ["## The base model's card", "", _demoted(body).strip(), ""]
    return "\n".join(lines)


def _loading(title: str, compact: bool, class_name: str | None) -> list[str]:
    auto = auto_class(class_name)
    trust = ", trust_remote_code=True" if compact else ""
    lines = ["```python", f"from transformers import {auto}", ""]
    lines += [f'model = {auto}.from_pretrained("{title}"{trust})', "```"]
    if compact:
        lines += [
            "",
            "The weights are stored compactly. The bundled `modeling_compress.py`, which needs only torch and transformers, "
            "decodes them into the stock class when the model is loaded; `compress unpack` writes them as a stock checkpoint.",
        ]
    return lines


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and the rest; front matter that cannot be read counts as text."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if match := _FRONT.match(text):
        try:
            data = YAML(typ="safe", pure=True).load(match[1])
        except (YAMLError, ValueError):
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
    """Headings two levels lower; code blocks as they are."""
    lines, fenced = [], False
    for line in text.split("\n"):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        if not fenced and (match := re.match(r"(#{1,6}) ", line)):
            line = "#" * min(len(match[1]) + 2, 6) + line[len(match[1]) :]
        lines.append(line)
    return "\n".join(lines)
