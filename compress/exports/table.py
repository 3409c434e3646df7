"""The targets by name. Imports none of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

from compress.exports.base import Target

#: Name ▶ module:class.
TARGETS: Mapping[str, str] = {
    "gguf": "compress.exports.gguf.target:Gguf",
    "onnx": "compress.exports.onnx.target:Onnx",
    "pt2": "compress.exports.pt2:Pt2",
}


@cache
def get(name: str) -> Target[Any]:
    """The target of a name in `TARGETS`."""
    module, _, attribute = TARGETS[name].partition(":")
    target: Target[Any] = getattr(import_module(module), attribute)()
    return target
