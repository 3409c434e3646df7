"""The record of a transformers model's family, and the list of blocks inside the model."""

from __future__ import annotations

from typing import Any

from compress import architectures
from compress.architectures.inferred import Inferred
from compress.spec.spec import Spec, Structure, Tensor


def record_of(model: Any) -> architectures.Architecture:
    """The record of a transformers model; one that is inferred names tensors as they are called in memory."""
    config = model.config.to_dict()
    if (record := architectures.find(config)) is not None:
        return record
    tensors = {name: Tensor(name, tuple(value.shape), "F32") for name, value in model.state_dict().items()}
    return architectures.record_for(Spec(Structure({**config, "architectures": [type(model).__name__]}), tensors))


def find_blocks(model: Any, record: architectures.Architecture) -> Any:
    """The main list of blocks of a transformers model."""
    names = {name for name, _ in model.named_modules()}
    if isinstance(record, Inferred):
        parts = record.lists[0].module.split(".")
        # a base model lacks the first parts
        return model.get_submodule(next(p for i in range(len(parts)) if (p := ".".join(parts[i:])) in names))
    blocks = record.module_blocks or record.blocks
    path = f"{record.prefix}.{blocks}"
    if path not in names:  # a base model has no prefix of its own, but parts of it may remain (OPT's decoder)
        path = next(p for p in (path.partition(".")[2], blocks) if p in names)
    return model.get_submodule(path)


def rotary_frequencies(model: Any) -> tuple[list[float], float] | None:
    """Angles per position of a model's rotary positions, and the factor of their cosines and sines; None without them."""
    part = next((m for m in model.modules() if hasattr(m, "inv_freq") and hasattr(m, "attention_scaling")), None)
    return None if part is None else (part.inv_freq.tolist(), float(part.attention_scaling))
