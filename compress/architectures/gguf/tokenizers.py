"""Names that llama.cpp has for the rules by which a tokenizer splits texts (``tokenizer.ggml.pre``; src/llama-vocab.cpp).

Its converter tells them by a hash of the ids of a text. Here they are recognised by the contents of tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Names of the kinds of tokenizers, ``tokenizer.ggml.model``: BPE of bytes, and BPE of SentencePiece.
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: Mapping[str, str] = {
    _CL100K: "cl100k",
    _CL100K.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2",
    _O200K: "gpt-4o",
    _TEKKEN: "tekken",
}
#: (rules of splitting, whether whole words of the vocabulary are taken without merges) ▶ name in llama.cpp.
_NAMES: Mapping[tuple[str, bool], str] = {
    ("gpt-2", False): "gpt-2",
    ("digits", False): "smollm",
    ("cl100k", True): "llama-bpe",
    ("cl100k", False): "dbrx",
    ("qwen2", False): "qwen2",
    ("gpt-4o", False): "gpt-4o",
    ("tekken", True): "tekken",
}


def steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or of a pre-tokenizer of tokenizer.json, one after another.

    Args:
        inner: name of the list of steps: ``normalizers`` or ``pretokenizers``.
    """
    if part is None:
        return []
    return [step for each in part[inner] for step in steps(each, inner)] if part["type"] == "Sequence" else [part]


def splitting_rules(splits: Sequence[Mapping[str, Any]], *, ignore_merges: bool) -> str | None:
    """llama.cpp's name of the rules of a byte-level tokenizer; None for rules that it has not.

    Args:
        splits: steps of the pre-tokenizer. ignore_merges: whether words of the vocabulary are taken without merges.
    """
    kinds, name = [step["type"] for step in splits], None
    if kinds and kinds[-1] == "ByteLevel" and not splits[-1].get("add_prefix_space"):
        plain = splits[-1].get("use_regex", True)
        if kinds == ["ByteLevel"]:
            name = "gpt-2" if plain else None
        elif kinds == ["Digits", "ByteLevel"]:
            name = "digits" if splits[0]["individual_digits"] and plain else None
        elif kinds == ["Split", "ByteLevel"] and splits[0]["behavior"] == "Isolated" and not splits[0].get("invert"):
            name = None if plain else _SPLITS.get(splits[0]["pattern"].get("Regex", ""))
    return _NAMES.get((name or "", ignore_merges))
