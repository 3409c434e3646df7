"""The record of a model without a class, by the names and shapes of its tensors alone."""

from __future__ import annotations

import re
from collections import defaultdict

from compress.architectures.inferred import BlockList, Inferred, Matrix, starred
from compress.spec.spec import Spec, Tensor

_TABLE = re.compile(r"emb|wte|wpe|position|tokens?$", re.IGNORECASE)
_HEAD = re.compile(r"(?:^|\.)(?:\w*lm_head|embed_out|output|decoder|vocab_projector|generator|head)$")
_NORM = re.compile(r"norm|ln_?\w*$|^ln", re.IGNORECASE)
_ROUTER = re.compile(r"(?:^|\.)(?:gate|wg)$|(?:^|\.)router(?:\.|$)")
_EXPERTS = re.compile(r"expert|moe|router", re.IGNORECASE)
#: A table of distances, added to attention scores.
_DISTANCES = re.compile(r"bias|^rel(?:ative)?_|distance", re.IGNORECASE)
#: Share of the largest list's elements from which another list counts.
_SHARE = 0.02


def by_shapes(spec: Spec, reason: str) -> Inferred:
    """The record of a model, by names and shapes.

    A list of blocks is a path that is followed by numbers. Linear layers are the matrices of two axes in it, but for tables,
    norms and routers. The largest table outside with a row per token of the vocabulary is the embedding.
    """
    lists = _lists(spec)
    outside = [t for t in spec.tensors.values() if not any(t.name.startswith(f"{e.path}.") for e in lists)]
    embedding, head = _ends(spec, outside)
    matrices: dict[str, Matrix] = {}
    routed = any(_EXPERTS.search(name) for name in spec.tensors)
    for tensor in spec.tensors.values():
        if len(tensor.shape) < 2:
            continue
        inside = any(tensor.name.startswith(f"{entry.path}.") for entry in lists)
        matrices[starred(tensor.name)] = _matrix(tensor, inside, not lists, embedding, head, routed)
    prefix, _, blocks = lists[0].path.rpartition(".") if lists else ("", "", "")
    below = f"{prefix}." if prefix else ""
    return Inferred(
        model_type=spec.structure.model_type,
        source="shapes",
        prefix=prefix,
        blocks=blocks,
        module_blocks=lists[0].module if lists else None,
        embeddings=() if embedding is None else (embedding.rpartition(".")[0].removeprefix(below),),
        stacks={entry.path.removeprefix(below): "" for entry in lists[1:]},
        head=None if head is None else head.rpartition(".")[0],
        head_tie=head or "",
        lists=lists,
        matrices=matrices,
        depth_key="",
        hidden_key="",
        heads_key="",
        causal=False,
        unknown=(reason,),
    )


def _lists(spec: Spec) -> tuple[BlockList, ...]:
    """The outermost paths that numbers from 0 on follow, by size."""
    sizes: dict[str, int] = defaultdict(int)
    numbers: dict[str, set[int]] = defaultdict(set)
    for tensor in spec.tensors.values():
        parts = tensor.name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if place is None or place in (0, len(parts) - 2):
            continue  # an item of a list of single layers
        path = ".".join(parts[:place])
        numbers[path].add(int(parts[place]))
        sizes[path] += tensor.count if len(tensor.shape) >= 2 else 0
    whole = [path for path, present in numbers.items() if present == set(range(len(present))) and sizes[path]]
    largest = max((sizes[path] for path in whole), default=0)
    kept = sorted((path for path in whole if sizes[path] >= _SHARE * largest), key=lambda path: -sizes[path])
    return tuple(BlockList(path, path, "main" if i == 0 else "stack") for i, path in enumerate(kept))


def _ends(spec: Spec, outside: list[Tensor]) -> tuple[str | None, str | None]:
    """Names of the token embedding and of the head; None where none looks like it."""
    rows = spec.structure.config.get("vocab_size")
    tables = [t for t in outside if len(t.shape) == 2 and t.name.endswith(".weight")]
    tall = [t for t in tables if t.shape[0] == rows] or [t for t in tables if t.shape[0] > 4 * t.shape[1]]
    named = [t for t in tall if _TABLE.search(t.module) and not _HEAD.search(t.module)]
    embedding = max(named or [t for t in tall if not _HEAD.search(t.module)], key=lambda t: t.count, default=None)
    head = next((t for t in tall if t is not embedding and _HEAD.search(t.module)), None)
    return None if embedding is None else embedding.name, None if head is None else head.name


def _matrix(tensor: Tensor, inside: bool, loose: bool, embedding: str | None, head: str | None, routed: bool) -> Matrix:
    """Role of a tensor, and whether passes take it.

    Args:
        inside: whether it is in a list of blocks. loose: whether the model has none. routed: whether the model has experts.
    """
    last = tensor.module.rpartition(".")[2]
    if tensor.name == head:
        return Matrix("head")
    if tensor.name == embedding or (not inside and _TABLE.search(tensor.module) and not _HEAD.search(tensor.module)):
        return Matrix("embedding")
    if routed and _ROUTER.search(tensor.module) and (inside or loose):
        return Matrix("router")
    if _DISTANCES.search(last):
        return Matrix("distances" if inside else "other")
    flat = len(tensor.shape) == 2 and tensor.name.endswith(".weight") and min(tensor.shape) > 1
    linear = flat and not _NORM.search(last) and not _TABLE.search(last)
    return Matrix("other", linear and (inside or loose))
