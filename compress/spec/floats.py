"""Floats that JSON has no notation for, as transformers writes them."""

from __future__ import annotations

from typing import Any

_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def decoded(value: Any) -> Any:
    """JSON values with the floats that transformers writes as objects, such as ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        tag = value.get("__float__") if len(value) == 1 else None
        return _FLOATS[tag] if isinstance(tag, str) and tag in _FLOATS else {k: decoded(v) for k, v in value.items()}
    return [decoded(v) for v in value] if isinstance(value, list) else value
