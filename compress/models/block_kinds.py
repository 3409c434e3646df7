"""Kinds of blocks, as the lists of a config tell them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

#: Fields with the number of blocks, the usual one first.
DEPTHS = re.compile(
    r"(\w+_)?(num_hidden_layers|num_layers|n_layers?|(encoder|decoder)_layers|num_(encoder|decoder)_layers)"
    r"|depth|layers|num_blocks|num_self_attends_per_block|n_(input|recurrent|output)_layers|num_layers_per_stack"
)


def depth_of(data: Mapping[str, Any]) -> int:
    """The number of blocks that a config's first field of depth gives; 0 without one."""
    return next(
        (
            v
            for k, v in sorted(data.items(), key=lambda item: item[0] != "num_hidden_layers")
            if DEPTHS.fullmatch(k) and isinstance(v, int) and not isinstance(v, bool)
        ),
        0,
    )


def is_indices(key: str, value: Sequence[Any], depth: int) -> bool:
    """Whether a list holds numbers of blocks."""
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return False
    named = re.search(r"(idxs|indexes|layer_ids|layers_indices|_layers|hybrid_layer_ids|layer_idx)$", key)
    return (
        bool(named)
        and (len(set(value)) == len(value))
        and all(v < max(depth, 1) for v in value)
        and (list(value) == sorted(value))
        and not (len(value) == depth and set(value) <= {0, 1})
    )


def kept_blocks(data: Mapping[str, Any]) -> list[int]:
    """Numbers of the blocks that a pico model has: the first of each kind, then others up to 3 or 4."""
    depth = depth_of(data)
    kinds: dict[tuple[Any, ...], list[int]] = {}
    lists = [(k, v) for k, v in data.items() if isinstance(v, (list, tuple)) and v]
    for index in range(depth):
        kind = tuple(
            (index in v) if is_indices(k, v, depth) else repr(v[index])
            for k, v in lists
            if is_indices(k, v, depth) or len(v) == depth
        )
        kinds.setdefault(kind, []).append(index)
    kept = {members[0] for members in kinds.values()}
    if len(kept) > 6:  # values that differ in each block are no kinds
        kept = {0}
    wanted = 3 if len(kept) == 1 else 4
    seconds = [members[1] for members in kinds.values() if len(members) > 1] if len(kept) > 1 else []
    for index in (*seconds, *range(depth)):
        if len(kept) >= wanted:
            break
        kept.add(index)
    return sorted(kept)
