"""The README of a compressed checkpoint: base model, results, recipe, how to load it, and the original card.

It has no times and no absolute paths, so that the same recipe gives the same text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.escape import fence, in_one_line, markdown, quoted
from compress.evaluation import metrics
from compress.report import figures
from compress.report.markdown import before_after_table, waterfall_table
from compress.spec.classes import CAUSAL_LM, auto_class
from compress.spec.spec import Runtime

#: Most characters of front matter; typical front matter has one or two thousand.
_LONGEST = 100_000
_FRONT = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
#: Schema of an evaluation ▶ its task, in the words of the hub.
_TASKS = {
    "compress.evaluation/1": "text-generation",
    "compress.classification/1": "text-classification",
    "compress.masked/1": "fill-mask",
    "compress.embeddings/1": "feature-extraction",
}


@dataclass(frozen=True, slots=True)
class Base:
    """The base model.

    Attributes:
        name: hub id, or name of a local folder. hub: it is a hub id. revision: of the hub id.
        ancestor: hub id that the config of a local folder names: the model itself, or one that it was trained from.
    """

    name: str
    hub: bool
    revision: str = ""
    ancestor: str | None = None


@dataclass(frozen=True, slots=True)
class Loading:
    """How the result is loaded.

    Attributes:
        class_name: stock class. compact: it needs ``trust_remote_code=True``. packages: what pip installs beside the library.
        dtype_auto: it needs ``dtype="auto"``. quantized: it has codes. sentences: it has the layout of sentence-transformers.
        runtime: what opens it.
    """

    class_name: str | None = None
    compact: bool = False
    packages: tuple[str, ...] = ()
    dtype_auto: bool = False
    quantized: bool = False
    sentences: bool = False
    runtime: Runtime = "transformers"


def model_card(
    report: Mapping[str, Any],
    original: str | None,
    *,
    base: Base,
    loading: Loading,
    recipe_yaml: str,
    picture: str | None = None,
) -> str:
    """Markdown with Hugging Face front matter.

    Args:
        original: README of the base model. Its front matter (licence, language, data) is kept; its text is appended.
        picture: file name of the main picture beside it.
    """
    front, body = _split(original or "")
    title = report["output"].replace("\\", "/").rstrip("/").rpartition("/")[2]
    library = front.get("library_name")
    sentences = loading.sentences or library == "sentence-transformers"
    lines = ["---", _front(front, report, base, loading, title, sentences).rstrip("\n"), "---", ""]
    lines += [markdown(f"# {in_one_line(title)}"), "", _made_of(report, base), ""]
    lines += [*_loading(title, loading, sentences), "", "## Results", ""]
    if picture is not None:
        lines += [f"![size against quality, and bytes saved by each pass]({picture})", ""]
    lines += [*before_after_table(report, timed=False), "", *(f"- {note}" for note in figures.row_notes(report)), ""]
    if note := figures.quality_note(report):
        lines += [markdown(in_one_line(f"Measured on {note}.")), ""]
    lines += [
        "## Bytes saved and quality lost by each pass",
        "",
        *waterfall_table(report, seconds=False),
        "",
        figures.BARS,
        "",
    ]
    around = fence(recipe_yaml)
    lines += ["## Recipe", "", f"{around}yaml", recipe_yaml.rstrip("\n"), around, ""]
    if body.strip():
        lines += ["## The base model's card", "", _demoted(body).strip(), ""]
    return "\n".join(lines)


def _made_of(report: Mapping[str, Any], base: Base) -> str:
    chain = " ▶ ".join(f"`{row['name']}`" for stage in report["stages"] for row in stage["passes"])
    named = f"[{base.name}](https://huggingface.co/{base.name})" if base.hub else f"`{in_one_line(base.name)}`"
    revision = f" at revision `{base.revision}`" if base.revision else ""
    return markdown(in_one_line(f"{named}{revision}, made smaller by {chain}."))


def _front(
    original: Mapping[str, Any],
    report: Mapping[str, Any],
    base: Base,
    loading: Loading,
    title: str,
    sentences: bool,
) -> str:
    """Front matter as YAML: the original's, updated. If the original's cannot be dumped, only the updates.

    Figures of the original are not those of the result, so its ``model-index`` is replaced.
    """
    tags = original.get("tags")
    tags = [*(tag for tag in (tags if isinstance(tags, list) else []) if isinstance(tag, str)), "compressed"]
    ours: dict[str, Any] = {}
    if base.hub:
        ours = {"base_model": base.name, "base_model_relation": "quantized" if loading.quantized else "finetune"}
    elif base.ancestor is not None and not original.get("base_model"):
        ours = {"base_model": base.ancestor}
    library = original.get("library_name")
    default = "sentence-transformers" if sentences else "transformers"
    ours["library_name"] = library if isinstance(library, str) and library else default
    ours["tags"] = list(dict.fromkeys(tags))
    kept = {key: value for key, value in original.items() if key != "model-index"}
    if index := _model_index(report, title):
        ours["model-index"] = index
    try:
        return _yaml({**kept, **ours})
    except Exception:  # some values load but do not dump
        return _yaml(ours)


def _model_index(report: Mapping[str, Any], title: str) -> list[dict[str, Any]]:
    """The measured metrics of the result, as the hub reads them; empty without an evaluation."""
    evaluation = report["result"]["evaluation"]
    if evaluation is None:
        return []
    known = [(metric, evaluation.get(metric.name)) for metric in metrics.of_evaluation(evaluation)]
    rows = [
        {"type": metric.name, "name": metric.title, "value": metric.rounded(value)}
        for metric, value in known
        if value is not None and math.isfinite(value)
    ]
    if not rows:
        return []
    files = (report["data"].get("evaluation") or {}).get("files", ())
    names = ", ".join(in_one_line(str(file).replace("\\", "/").rpartition("/")[2]) for file in files)
    kind = evaluation.get("of", "texts") if evaluation["schema"] == "compress.classification/1" else "text"
    task = "image-classification" if kind == "images" else _TASKS[evaluation["schema"]]
    result = {"task": {"type": task}, "dataset": {"type": kind, "name": names or kind}, "metrics": rows}
    return [{"name": in_one_line(title), "results": [result]}]


def _loading(title: str, loading: Loading, sentences: bool) -> list[str]:
    """Lines on what to install, and the call that loads the result."""
    if loading.runtime == "vllm":
        text = "vLLM serves it. Stock transformers does not load its codes; `compress unpack` writes it as a dense checkpoint:"
        return [text, "", "```sh", f"vllm serve {_shell(title)}", "```"]
    library = "sentence-transformers" if sentences else "transformers"
    lines: list[str] = []
    if loading.packages or sentences:
        packages = " ".join(f'"{p}"' if ">" in p else p for p in (library, *loading.packages))
        lines = ["```sh", f"pip install {packages}", "```", ""]
    auto = "SentenceTransformer" if sentences else auto_class(loading.class_name)
    options = ", trust_remote_code=True" if loading.compact else ""
    if loading.dtype_auto:
        options += ', model_kwargs={"dtype": "auto"}' if sentences else ', dtype="auto"'
    call = auto if sentences else f"{auto}.from_pretrained"
    lines += ["```python", f"from {library.replace('-', '_')} import {auto}", ""]
    lines += [f"model = {call}({quoted(title)}{options})", "```"]
    if loading.compact:
        return [
            *lines,
            "",
            "The weights are stored compactly. The bundled `modeling_compress.py`, which needs only torch and transformers, "
            "decodes them into the stock class when the model is loaded; `compress unpack` writes them as a stock checkpoint.",
        ]
    if (loading.class_name or "").endswith(CAUSAL_LM.suffixes):
        lines += ["", "vLLM serves it as it is, if it has the architecture:", "", "```sh"]
        lines += [f"vllm serve {_shell(title)}", "```"]
    return lines


def _shell(text: str) -> str:
    """Text as a word of a shell."""
    return text if re.fullmatch(r"[\w.-]+", text, re.ASCII) else "'" + in_one_line(text).replace("'", "'\\''") + "'"


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
