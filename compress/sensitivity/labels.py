"""Labels drawn from a model's own predictions, as the Fisher information asks for."""

from __future__ import annotations

import torch

from compress.errors import CheckpointError


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Labels drawn from the distributions of logits [N, classes], int64 [N].

    Raises:
        CheckpointError: NaN or infinite logits.
    """
    if not torch.isfinite(logits).all():
        raise CheckpointError("the model predicts NaN or infinite values on a calibration sample")
    return torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
