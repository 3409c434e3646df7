"""Applying one pass to a checkpoint in tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from compress import architectures, passes
from compress.checkpoint.open import Stored, open_checkpoint
from compress.checkpoint.values import Checkpoint
from compress.checkpoint.write import write_checkpoint
from compress.models.blocks import find_blocks
from compress.models.loading import load_model
from compress.passes.base import Context
from compress.progress import SilentProgress
from compress.workspace import Workspace


def apply(
    checkpoint: Checkpoint,
    name: str,
    *,
    data: Any = None,
    work: Path = Path("/nowhere"),
    details: dict[str, Any] | None = None,
    **settings: Any,
) -> Checkpoint:
    """The lazily changed checkpoint."""
    instance = passes.get(name)
    context = Context(
        checkpoint,
        "cpu",
        "float32",
        0,
        None,
        lambda key: data,
        SilentProgress(),
        Workspace(work),
        details={} if details is None else details,
    )
    return instance.apply(checkpoint, instance.settings(**settings), context)


def plan(checkpoint: Checkpoint, name: str, **settings: Any) -> Any:
    """The planned spec."""
    instance = passes.get(name)
    return instance.plan(checkpoint.spec, instance.settings(**settings))


def write(checkpoint: Checkpoint, folder: Path, **kwargs: Any) -> Stored:
    """Written and opened again."""
    return open_checkpoint(write_checkpoint(checkpoint, folder, **kwargs).folder)


def divergence(original: Any, changed: Any, ids: torch.Tensor) -> float:
    """Mean KL of a model's predictions from those of the original, of checkpoints or models."""
    models = [load_model(m) if isinstance(m, Path) else m for m in (original, changed)]
    with torch.no_grad():
        x, y = (m(input_ids=ids)[0].log_softmax(-1) for m in models)
    return float(torch.nn.functional.kl_div(y, x, log_target=True, reduction="sum")) / ids.numel()


def bypass(model: Any, numbers: Iterable[int]) -> None:
    """Blocks hand on what they read; where a block returns a tuple, it still does."""
    blocks = find_blocks(model, architectures.of(model.config.to_dict()))
    for number in numbers:

        def forward(hidden_states: Any, *args: Any, real: Any = blocks[number].forward, **kwargs: Any) -> Any:
            output = real(hidden_states, *args, **kwargs)
            return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

        blocks[number].forward = forward
