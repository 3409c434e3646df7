"""Optimizers and schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

OptimizerName = Literal["adamw", "muon", "adafactor"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]
#: Share of the steps over which ``wsd`` lets the rate fall (MiniCPM, arXiv 2404.06395; Hägele et al., arXiv 2405.18392).
DECAY = 0.4


@dataclass(frozen=True)
class Update:
    """Optimizer, schedule and rates.

    Attributes:
        rate: peak learning rate.
        warmup: share of the steps over which it rises.
        decay: weight decay of matrices.
    """

    optimizer: OptimizerName = "adamw"
    rate: float = 1e-3
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    decay: float = 0.0

    def factor(self, step: int, steps: int) -> float:
        """Factor of the learning rate at a step, from 0."""
        rise = max(1, round(self.warmup * steps))
        if step < rise and self.warmup > 0:
            return (step + 1) / rise
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "wsd":
            fall = max(1, round(DECAY * steps))
            return min(1.0, (steps - step) / fall)
        done = (step - rise) / max(1, steps - rise)
        return 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1.0 - done


def optimizers(
    module: torch.nn.Module, embeddings: Sequence[torch.Tensor], options: Update
) -> list[torch.optim.Optimizer]:
    """One optimizer, or two with ``muon``: Muon for the matrices, AdamW for embeddings and all else.

    Muon (Jordan 2024) takes steps as large as AdamW's (arXiv 2502.16982).

    Args:
        embeddings: matrices whose rows are looked up.
    """
    tables = {id(p) for p in embeddings}
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in tables]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained if id(p) not in chosen]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": options.decay},
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": options.decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if options.optimizer == "muon":
        muon = torch.optim.Muon(matrices, lr=options.rate, weight_decay=options.decay, adjust_lr_fn="match_rms_adamw")
        return [muon, _adamw([g for g in groups[1:] if g["params"]], options.rate)]
    groups = [g for g in groups if g["params"]]
    if options.optimizer == "adafactor":
        return [torch.optim.Adafactor(groups, lr=options.rate)]
    return [_adamw(groups, options.rate)]


def _adamw(groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    # fused: the foreach implementation would hold copies of all weights
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def set_rate(all_: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for optimizer in all_:
        for group in optimizer.param_groups:
            group["lr"] = rate
