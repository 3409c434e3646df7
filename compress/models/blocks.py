"""The list of blocks inside a transformers model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress import architectures


def find_blocks(model: Any, record: architectures.Architecture) -> Any:
    """The list of blocks of a transformers model."""
    names = {name for name, _ in model.named_modules()}
    blocks = record.module_blocks or record.blocks
    path = f"{record.prefix}.{blocks}"
    if path not in names:  # a base model has no prefix of its own, but parts of it may remain (OPT's decoder)
        path = next(p for p in (path.partition(".")[2], blocks) if p in names)
    return model.get_submodule(path)
