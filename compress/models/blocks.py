"""The record of a transformers model's family, and the list of blocks inside the model."""

from __future__ import annotations

from typing import Any

from compress import architectures


def record_of(model: Any) -> architectures.Architecture:
    """The record of the family of a transformers model. Raises `PassError` where there is none."""
    return architectures.of(model.config.to_dict())


def find_blocks(model: Any, record: architectures.Architecture) -> Any:
    """The list of blocks of a transformers model."""
    names = {name for name, _ in model.named_modules()}
    blocks = record.module_blocks or record.blocks
    path = f"{record.prefix}.{blocks}"
    if path not in names:  # a base model has no prefix of its own, but parts of it may remain (OPT's decoder)
        path = next(p for p in (path.partition(".")[2], blocks) if p in names)
    return model.get_submodule(path)


def rotary_frequencies(model: Any) -> tuple[list[float], float] | None:
    """Angles per position of a model's rotary positions, and the factor of their cosines and sines; None without them."""
    part = next((m for m in model.modules() if hasattr(m, "inv_freq") and hasattr(m, "attention_scaling")), None)
    return None if part is None else (part.inv_freq.tolist(), float(part.attention_scaling))
