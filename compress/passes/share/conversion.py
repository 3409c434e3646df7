"""Convert a checkpoint whose blocks share all tensors to a stock family (`architectures.conversions`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.architectures.conversions import SharedBlocks
from compress.passes.tokenizers import with_tokenizer_class

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
    result.rewritten = {**checkpoint.rewritten, **with_tokenizer_class(checkpoint, conversion.tokenizer_class)}
    return result
