"""Metadata of a GGUF file, asked for by keys of its architecture. Imports no torch."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from compress.errors import CheckpointError

#: Function of the name of a small float32 tensor: its values.
ReadFloats = Callable[[str], tuple[float, ...]]
#: Rules by which a byte-level tokenizer splits text as that of GPT-2 does, or also at digits where the vocabulary joins none.
_PLAIN = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais", "smollm"})


class Metadata:
    """Metadata of a file, by keys of its architecture. Errors name the key."""

    def __init__(
        self, data: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], read: ReadFloats, where: str
    ) -> None:
        self._data, self.shapes, self.read, self.where = data, shapes, read, where
        self.architecture = str(data.get("general.architecture"))

    def error(self, what: str, fix: str | None = None) -> CheckpointError:
        """An error about the file."""
        return CheckpointError(what, where=self.where, fix=fix)

    def raw(self, key: str) -> Any:
        """Value of a key with its full name; None without it."""
        return self._data.get(key)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._data.get(f"{self.architecture}.{key}", default)
        if type(value) is not int or value < 1:
            raise self.error(f"has no usable `{self.architecture}.{key}`: {str(value)[:40]}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, as its shortest decimal that float32 reads back."""
        value = self._data.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.error(f"has no usable `{self.architecture}.{key}`: {str(value)[:40]}")
        return shortest(value)

    def has(self, key: str) -> bool:
        """Whether the architecture's key is there."""
        return f"{self.architecture}.{key}" in self._data

    def text(self, key: str) -> str | None:
        """A text; None without it."""
        value = self._data.get(f"{self.architecture}.{key}")
        return None if value is None else str(value)


def shortest(value: float) -> float:
    """The shortest decimal that gives the same float32: 1e-05 for 9.99999974e-06."""
    single = struct.unpack("<f", struct.pack("<f", value))[0]
    if single != value:
        return value
    return next(
        x for digits in range(1, 18) if struct.pack("<f", x := float(f"{value:.{digits}g}")) == struct.pack("<f", value)
    )


def unknown_rules(data: Mapping[str, Any], known: Iterable[str]) -> str | None:
    """Name of the rules by which the file's tokenizer splits text, where they are not ``known``; None where they are."""
    rules = str(data.get("tokenizer.ggml.pre"))
    byte_level = data.get("tokenizer.ggml.model") == "gpt2"  # others split at no rules
    return repr(rules) if byte_level and rules not in _PLAIN.union(known) else None
