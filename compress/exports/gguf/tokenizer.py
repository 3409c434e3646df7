"""The tokenizer of a GGUF file: metadata that make llama.cpp split a text into the same ids as transformers does.

The rules by which it splits texts are recognised by their contents, see `compress.architectures.gguf.tokenizers`. Unknown
ones are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.architectures.gguf.tokenizers import BYTE_LEVEL, SENTENCEPIECE, splitting_rules, steps
from compress.exports.base import ExportError

#: Types of tokens in llama.cpp.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def tokenizer_metadata(folder: Path, vocabulary: int, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Metadata of a tokenizer, by full key.

    Args:
        vocabulary: rows of the embedding table.

    Raises:
        ExportError: llama.cpp has no such tokenizer. CheckpointError: there is none, or it cannot be read.
    """
    from compress.models.processors import load_tokenizer

    tokenizer: Any = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("is not one of the library tokenizers", folder)
    data = json.loads(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise _refused(f"is of the kind {model['type']}; BPE and SentencePiece's BPE are written", folder)
    tokens, types = _tokens(data, vocabulary)
    values: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if _is_sentencepiece(data):
        values |= {"model": SENTENCEPIECE, "pre": "default", "scores": _scores(model, tokens)}
        values["add_space_prefix"] = _prefixed(data)
    elif not model["merges"]:
        raise _refused("has no merges", folder)
    else:
        values |= {"model": BYTE_LEVEL, "pre": _rules(data, folder), "merges": _merges(model)}
    values |= _special(tokenizer, backend)
    result = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if isinstance(tokenizer.chat_template, str):
        result["tokenizer.chat_template"] = tokenizer.chat_template
    elif isinstance(tokenizer.chat_template, dict) and "default" in tokenizer.chat_template:
        result["tokenizer.chat_template"] = tokenizer.chat_template["default"]
    return result


def _refused(what: str, folder: Path) -> ExportError:
    return ExportError(f"the tokenizer {what}", where=str(folder), fix="llama.cpp would give other ids")


def _tokens(data: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id. Ids without a token are padding."""
    names: dict[int, str] = {number: token for token, number in data["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in data["added_tokens"]}
    tokens, types = [], []
    unknown = data["model"].get("unk_token")
    byte_fallback = bool(data["model"].get("byte_fallback"))
    for number in range(vocabulary):
        if (entry := added.get(number)) is not None:
            tokens.append(entry["content"])
            types.append(CONTROL if entry["special"] else USER_DEFINED)
            if byte_fallback and entry["content"] == unknown:
                types[-1] = UNKNOWN
        elif (token := names.get(number)) is not None:
            tokens.append(token)
            is_byte = byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            types.append(BYTE if is_byte else UNKNOWN if byte_fallback and token == unknown else NORMAL)
        else:
            tokens.append(f"[PAD{number}]")
            types.append(UNUSED)
    return tokens, types


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _merges(model: Mapping[str, Any]) -> list[str]:
    """Merges in order, as two tokens with a space between them; spaces within a token are written as the byte-level one."""
    return [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in _pairs(model)]


def _is_sentencepiece(data: Mapping[str, Any]) -> bool:
    """Whether it is a BPE of SentencePiece: it falls back on bytes and writes spaces as ▁."""
    normal = steps(data["normalizer"], "normalizers")
    split = steps(data["pre_tokenizer"], "pretokenizers")
    replaced = any(s["type"] == "Replace" and s.get("content") == "\u2581" for s in normal)
    return bool(data["model"].get("byte_fallback")) and (replaced or any(s["type"] == "Metaspace" for s in split))


def _prefixed(data: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    normal = steps(data["normalizer"], "normalizers")
    split = steps(data["pre_tokenizer"], "pretokenizers")
    meta = any(s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never" for s in split)
    return meta or any(s["type"] == "Prepend" for s in normal)


def _scores(model: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Scores by id. llama.cpp joins the two neighbours whose token has the highest, so it is the rank of the first merge."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(model)):
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token]) if token in ranks else -1e6 for token in tokens]


def _rules(data: Mapping[str, Any], folder: Path) -> str:
    """Name of the rules by which the tokenizer splits a text. Raises `ExportError` for rules that llama.cpp has not."""
    normal = [s["type"] for s in steps(data["normalizer"], "normalizers")]
    splits = steps(data["pre_tokenizer"], "pretokenizers")
    name = splitting_rules(splits, ignore_merges=bool(data["model"].get("ignore_merges")))
    if name is None or normal not in ([], ["NFC"]):
        kinds = ", ".join([*normal, *(step["type"] for step in splits)]) or "none"
        raise _refused(f"splits texts by rules that llama.cpp does not know ({kinds})", folder)
    return name


def _special(tokenizer: Any, backend: Any) -> dict[str, Any]:
    """Ids of special tokens, and which of them are put around a text."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "padding_token_id": tokenizer.pad_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
    }
    around = list(tokenizer("a").input_ids)
    inside = list(tokenizer("a", add_special_tokens=False).input_ids)
    return {
        **{key: value for key, value in ids.items() if value is not None},
        "add_bos_token": around != inside and around[:1] == [ids["bos_token_id"]],
        "add_eos_token": around != inside and around[-1:] == [ids["eos_token_id"]],
    }
