"""The arguments of a block beside its hidden states, as a model passes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import torch

#: A block's arguments beside its hidden states: positional ones, and those by name.
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Hidden(Enum):
    """Stands for the hidden states themselves among a block's other arguments, as for keys beside queries."""

    HIDDEN = "hidden states"


def recorded(hidden: torch.Tensor | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """A block's arguments, without caches, and with a mark where they are its hidden states."""

    def one(value: Any) -> Any:
        return _Hidden.HIDDEN if hidden is not None and value is hidden else _without_cache(value)

    return tuple(map(one, args)), {k: one(v) for k, v in kwargs.items()}


def filled(call: Call, hidden: torch.Tensor) -> Call:
    """The arguments of a call for those hidden states."""
    args, kwargs = call

    def one(value: Any) -> Any:
        return hidden if value is _Hidden.HIDDEN else value

    return tuple(map(one, args)), {k: one(v) for k, v in kwargs.items()}


def _without_cache(value: Any) -> Any:
    return None if type(value).__name__.endswith("Cache") else value


def leaves(value: Any) -> Iterator[Any]:
    """The values in nested tuples, lists and dicts."""
    if isinstance(value, (tuple, list)):
        for one in value:
            yield from leaves(one)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value


def equal(a: Any, b: Any) -> bool:
    """Whether two arguments are the same, value by value."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return bool(a == b) if not hasattr(a, "__dict__") else a is b or type(a) is type(b)
