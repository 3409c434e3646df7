"""Convert a checkpoint whose blocks share all tensors to a stock family (`architectures.conversions`)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from compress.architectures.conversions import SharedBlocks
from compress.checkpoint.sidecars import safe_file

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint


def convert(checkpoint: Checkpoint, conversion: SharedBlocks, groups: int) -> Checkpoint:
    """The checkpoint as a stock model of the other family, with ``groups`` groups of blocks."""
    import torch

    from compress.checkpoint.values import Derived, Value, torch_dtype

    spec, sources = conversion.converted(checkpoint.spec, groups)

    def read(name: str) -> Value:
        if name in sources:
            return checkpoint.tensor(sources[name])
        tensor = spec.tensors[name]
        dtype = torch_dtype(tensor.dtype)
        return Value(
            torch.eye(tensor.shape[0], dtype=dtype)
            if len(tensor.shape) == 2
            else torch.zeros(tensor.shape, dtype=dtype)
        )

    result = Derived(checkpoint, spec, read)
    result.rewritten = {**checkpoint.rewritten, **_tokenizer(checkpoint, conversion.tokenizer_class)}
    return result


def _tokenizer(checkpoint: Checkpoint, tokenizer_class: str) -> dict[str, bytes]:
    """Tokenizer config with its class, since the new model type does not imply it."""
    folder = checkpoint.folder
    if folder is None or not any(safe_file(folder, name).exists() for name in ("tokenizer.json", "vocab.txt")):
        return {}
    path = safe_file(folder, "tokenizer_config.json")
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config.setdefault("tokenizer_class", tokenizer_class)
    return {"tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
