"""Windows in a stock class: the spec, and the checkpoint that is read by it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.architectures.conversions.windows import SOURCES, current_windows, target_of, windowed
from compress.architectures.model_map import model_map
from compress.errors import PassError
from compress.passes.local_attention.choose import Windows
from compress.passes.local_attention.settings import LocalAttentionSettings
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint


def planned(spec: Spec, settings: LocalAttentionSettings, chosen: Windows) -> tuple[Spec, dict[str, float]]:
    """The spec with those windows, and the tensors that it has more ▶ the value that fills them.

    Raises:
        PassError: no stock class can express it, or nothing would change.
    """
    target = target_of(spec, sinks=settings.sinks == "learned", named=settings.target)
    if all(window is None for window in chosen.windows):
        raise PassError("every block would stay full", key="full", fix="set a smaller `full`")
    if chosen.windows == current_windows(spec) and target is None and not settings.allow_noop:
        raise PassError("the model has these windows already", key="window", fix="leave the pass out")
    return windowed(spec, chosen.windows, target)


def with_windows(checkpoint: Checkpoint, settings: LocalAttentionSettings, chosen: Windows) -> Checkpoint:
    """The checkpoint in a stock class with those windows and logits, lazily. Other weights stay as they are."""
    import torch

    from compress.checkpoint.values import Derived, Value, torch_dtype
    from compress.passes.tokenizers import with_tokenizer_class

    before = checkpoint.spec.structure.model_type
    spec, added = planned(checkpoint.spec, settings, chosen)
    paths = model_map(spec).paths
    logits = {f"{paths[i]}self_attn.sinks": values for i, values in chosen.sinks.items()}

    def read(name: str) -> Value:
        dtype = torch_dtype(spec.tensors[name].dtype)
        if name in logits:
            return Value(logits[name].to(dtype))
        if name in added:
            return Value(torch.full(spec.tensors[name].shape, added[name], dtype=dtype))
        return checkpoint.tensor(name)

    result = Derived(checkpoint, spec, read)
    if spec.structure.model_type != before:
        result.rewritten = {**result.rewritten, **with_tokenizer_class(checkpoint, SOURCES[before].tokenizer_class)}
    return result
