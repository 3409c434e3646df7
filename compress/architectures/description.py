"""Facts about a model's architecture, as JSON values and as Python text. No torch for written records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from compress.architectures.groups import Attention, Mlp
from compress.architectures.inferred import Inferred, starred
from compress.architectures.model_map import ModelMap
from compress.errors import CompressError

#: Config fields that a record names.
_KEYS = (
    "depth_key", "hidden_key", "heads_key", "kv_heads_key", "head_dim_key", "experts_key", "active_experts_key",
)  # fmt: skip


def describe(mapped: ModelMap) -> dict[str, Any]:
    """The blocks, roles, embeddings, head, ties and groups of a model, as JSON values."""
    record = mapped.record
    return {
        "model_type": record.model_type,
        "class": mapped.spec.structure.class_name,
        "source": record.source,
        "lists": _lists(mapped),
        "parts": _parts(mapped),
        "embeddings": [m for m in mapped.modules if _role(mapped, m) == "embedding"],
        "head": record.head if mapped.has_head else None,
        "ties": [[name, tensor.alias_of] for name, tensor in mapped.spec.tensors.items() if tensor.alias_of],
        "keys": {key.removesuffix("_key"): _key(record, key) for key in _KEYS if getattr(record, key)},
        "per_layer": list(record.per_layer),
        "groups": _groups(mapped),
        "unknown": _unknown(mapped),
    }


def _key(record: Any, key: str) -> str:
    section = record.section if isinstance(record, Inferred) else ""
    return f"{section}.{getattr(record, key)}".lstrip(".")


def _role(mapped: ModelMap, module: str) -> str | None:
    matrix = mapped.linears.get(f"{module}.weight")
    return None if matrix is None or matrix.block is not None else matrix.role


def _lists(mapped: ModelMap) -> list[dict[str, Any]]:
    """The lists of blocks, and the towers beside them."""
    counts: dict[str, set[int]] = {}
    for block in mapped.blocks:
        counts.setdefault(block.path[:-1].rpartition(".")[0], set()).add(block.index)
    record = mapped.record
    rows = [
        {"path": path, "kind": "stack" if place else "main", "blocks": len(numbers)}
        for place, (path, numbers) in enumerate(counts.items())
    ]
    if isinstance(record, Inferred):
        for entry in record.of_kind("tower"):
            start = f"{entry.path}."
            numbers = {n[len(start) :].partition(".")[0] for n in mapped.spec.tensors if n.startswith(start)}
            rows.append({"path": entry.path, "kind": "tower", "blocks": len(numbers)})
    return rows


def _parts(mapped: ModelMap) -> list[dict[str, Any]]:
    """Matrices inside the blocks, alike ones once: role, shapes, and in how many blocks."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for matrix in mapped.linears.values():
        path = mapped.path_of(matrix.name)
        if path is None:
            continue
        home = path[:-1].rpartition(".")[0]
        name = starred(matrix.name[len(path) :]).removesuffix(".weight")
        row = rows.setdefault(
            (home, name),
            {"list": home, "part": name, "role": matrix.role, "layer": matrix.is_layer, "shapes": [], "blocks": set()},
        )
        row["blocks"].add(matrix.block)
        if list(matrix.tensor.shape) not in row["shapes"]:
            row["shapes"].append(list(matrix.tensor.shape))
    return [{**row, "blocks": len(row["blocks"])} for row in rows.values()]


def _groups(mapped: ModelMap) -> list[str]:
    """The groups of neurons and heads, in words."""
    record = mapped.record
    attentions = (("heads", record.attention), ("heads of cross-attention", record.cross))
    heads = [f"{kind}: {_attention(one)}" for kind, one in attentions if one is not None]
    return [*(f"neurons: {_mlp(mlp)}" for mlp in record.mlps), *heads]


def _mlp(mlp: Mlp) -> str:
    return f"{', '.join(mlp.up)} ▶ {mlp.down}"


def _attention(attention: Attention) -> str:
    return f"{', '.join(dict.fromkeys((attention.query, attention.key, attention.value)))} ▶ {attention.output}"


def _unknown(mapped: ModelMap) -> list[str]:
    """Facts that could not be told, in words."""
    record = mapped.record
    missing = {
        "a list of blocks": record.blocks,
        "the field with the number of blocks": record.depth_key or not record.blocks,
        "neurons to remove": record.mlps,
        "heads to remove": record.attention or record.attention_parts,
    }
    words = [name for name, known in missing.items() if not known]
    return [*words, *(record.unknown if isinstance(record, Inferred) else ())]


def to_python(mapped: ModelMap) -> str:
    """An inferred record as the text of a module that an entry point can name (``module:RECORD``).

    Raises:
        CompressError: the family has a written record.
    """
    record, structure = mapped.record, mapped.spec.structure
    if not isinstance(record, Inferred):
        raise CompressError(f"the record of {record.model_type} is written already", fix="leave out `--save`")
    given = {key for key in record.defaults if _given(record, structure.config, key)}
    record = replace(record, defaults={k: v for k, v in record.defaults.items() if k not in given})
    body: list[str] = []
    for one in fields(record):
        value = getattr(record, one.name)
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if not callable(value) and value != default:
            body += _entry(one.name, value)
    text = "\n".join(body)
    groups = [name for name in ("Attention", "Mlp") if f"{name}(" in text]
    own = [name for name in ("BlockList", "Inferred", "Matrix") if name == "Inferred" or f"{name}(" in text]
    head = [
        f'"""The record of {record.model_type}, read off {structure.class_name or "its base class"} by `compress inspect`."""',
        "",
        *([f"from compress.architectures.groups import {', '.join(groups)}"] if groups else []),
        f"from compress.architectures.inferred import {', '.join(own)}",
        "",
        "RECORD = Inferred(",
    ]
    return "\n".join([*head, *body, ")", ""])


def _given(record: Inferred, config: Mapping[str, Any], key: str) -> bool:
    """Whether a config gives a field itself, by its own name or with dots."""
    section, _, last = key.rpartition(".")
    return last in record.part_of(config, section) or key in record.part_of(config)


def _entry(name: str, value: Any) -> list[str]:
    """Lines of one argument."""
    if isinstance(value, Mapping) and value:
        return [f"    {name}={{", *(f"        {key!r}: {item!r}," for key, item in value.items()), "    },"]
    if isinstance(value, tuple) and len(repr(value)) > 100:
        return [f"    {name}=(", *(f"        {item!r}," for item in value), "    ),"]
    return [f"    {name}={value!r},"]
