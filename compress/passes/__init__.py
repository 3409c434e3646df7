"""The passes: a folder each, and entry points of the group ``compress.passes`` from other packages."""

from __future__ import annotations

import ast
import difflib
import pkgutil
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.extensions import entry_points

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from compress.passes.base import Pass


def _folders() -> dict[str, str]:
    """Return name ▶ ``module:class`` of the passes here: a folder ``my_pass`` has ``my_pass.py`` with the class ``MyPass``."""
    names = (name for _, name, is_folder in pkgutil.iter_modules(__path__) if is_folder)
    return {name: f"{__name__}.{name}.{name}:{name.title().replace('_', '')}" for name in sorted(names)}


#: Name in recipes ▶ module:class. A folder in this package is a pass; nothing else registers it.
TABLE = _folders()

#: Words of other tools ▶ the passes that they mean.
WORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("prune", "pruning"), ("prune_unstructured", "prune_structured")),
    **dict.fromkeys(("quantize", "quantise", "quantization", "quantisation", "quant", "gptq", "awq", "rtn"), ("cast",)),
    **dict.fromkeys(("smoothquant", "spinquant", "quarot"), ("cast",)),
    **dict.fromkeys(("sparsify", "sparsity", "sparsegpt", "wanda", "alps", "magnitude"), ("prune_unstructured",)),
    **dict.fromkeys(("drop_layers", "shortgpt", "minitron"), ("prune_structured",)),
    **dict.fromkeys(("factorise", "svd", "low_rank", "lora", "decompose"), ("factorize",)),
    **dict.fromkeys(("tie", "cluster"), ("share",)),
    **dict.fromkeys(
        ("sliding_window", "swa", "windows", "streamingllm", "duoattention", "longformer", "sparse_attention"),
        ("local_attention",),
    ),
    **dict.fromkeys(("mla", "palu", "transmla"), ("latent_attention",)),
    **dict.fromkeys(("linformer",), ("low_rank_attention",)),
    **dict.fromkeys(("distil", "distillation", "train", "finetune"), ("distill",)),
}


@cache
def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points("compress.passes")}


def names() -> list[str]:
    """Names of all passes, those of this package first."""
    return [*TABLE, *sorted(_entry_points().keys() - TABLE.keys())]


@cache
def get(name: str) -> Pass[Any]:
    """The pass of that name. Raises `CompressError` with a suggestion where there is none."""
    if name in TABLE:
        module, _, attribute = TABLE[name].partition(":")
        cls = getattr(import_module(module), attribute)
    elif name in _entry_points():
        cls = _entry_points()[name].load()
    else:
        meant = WORDS.get(name.lower()) or difflib.get_close_matches(name, names(), n=1)
        question = f"did you mean {' or '.join(f'`{word}`' for word in meant)}?"
        raise CompressError(
            f"no pass is called `{name}`", fix=question if meant else f"there are: {', '.join(names())}"
        )
    instance: Pass[Any] = cls()
    return instance


def summaries() -> list[dict[str, Any]]:
    """``name``, ``summary`` and ``needs`` of every pass. Those of this package are read off their source and not imported."""
    rows = []
    for name in names():
        facts = _written(name) if name in TABLE else None
        if facts is None:
            instance = get(name)
            facts = {"summary": instance.summary, "needs": instance.needs}
        rows.append({"name": name, "summary": facts["summary"], "needs": sorted(facts["needs"])})
    return rows


def _written(name: str) -> dict[str, Any] | None:
    """``summary`` and ``needs`` as literals in the class of a pass; None where one is not."""
    path = Path(__path__[0], name, f"{name}.py")
    facts: dict[str, Any] = {}
    for statement in (s for c in ast.parse(path.read_bytes()).body if isinstance(c, ast.ClassDef) for s in c.body):
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
            continue
        target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
        if isinstance(target, ast.Name) and target.id in ("summary", "needs"):
            value = statement.value
            inner = value.args[0] if isinstance(value, ast.Call) and value.args else value
            try:
                facts.setdefault(target.id, ast.literal_eval(inner))
            except ValueError:
                return None
    return facts if len(facts) == 2 else None
