"""Tokenizer files of a checkpoint that becomes a model of another family."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from compress.checkpoint.sidecars import safe_file

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint


def with_tokenizer_class(checkpoint: Checkpoint, tokenizer_class: str | None) -> dict[str, bytes]:
    """Tokenizer config with its class, since the new model type does not imply it; empty for None, or without a tokenizer."""
    folder = checkpoint.folder
    names = ("tokenizer.json", "vocab.txt")
    if tokenizer_class is None or folder is None or not any(safe_file(folder, name).exists() for name in names):
        return {}
    path = safe_file(folder, "tokenizer_config.json")
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config.setdefault("tokenizer_class", tokenizer_class)
    return {"tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
