"""Moving a changed block towards the output that the original model has there, by gradient on the calibration samples.

What solvers leave to be done: they see one matrix at a time, and inputs as the blocks before have made them; here all float
tensors of a block (weights that are kept, norms, biases) move together, against the original's own activations. As in
block-wise reconstruction of quantised models (BRECQ, arXiv 2102.05426; AutoRound, arXiv 2309.05516), for any change that is
a projection of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from compress.calibration.sweep import Block

#: Where tuning does not pay, it is tried again at a rate so many times lower, twice.
RETRY = 4
#: Share of the samples that are held out to see whether tuning pays; at least one.
HELD_OUT = 1 / 16


@dataclass(frozen=True)
class Tuning:
    """How to tune a block.

    Attributes:
        epochs: passes over the samples; 0 for none. rate: Adam's step, relative to the root mean square of each tensor.
        batch: samples of one step.
    """

    epochs: int = 5
    rate: float = 0.04
    batch: int = 4


def tune(
    block: Block, how: Tuning, project: Callable[[], None], parameters: Sequence[torch.nn.Parameter] | None = None
) -> dict[str, Any]:
    """Tune a block in place.

    The loss is the mean squared difference to ``block.targets`` over their variance. Steps are Adam's, with a rate that falls
    linearly to zero. Some samples are held out: if the error there ends no lower than it began, everything is put back and
    tried at lower rates, and left as it was if none pays.

    Args:
        project: called after every step; puts removed weights back to zero (or rounds).
        parameters: what moves; every float parameter of the block by default.

    Returns:
        ``before`` and ``after``: relative error on the held-out samples; ``rate`` tried last; ``steps`` in all; ``kept``:
        whether it paid.
    """
    sweep = block.sweep
    assert block.targets is not None
    moving = [p for p in (parameters or block.module.parameters()) if p.is_floating_point()]
    order = torch.Generator().manual_seed(sweep.seed * 1_000_003 + block.index)
    samples = torch.randperm(sweep.inputs.samples, generator=order).tolist()
    held = max(1, round(HELD_OUT * len(samples))) if len(samples) > 1 else 0
    test, train = samples[:held], samples[held:]
    before, deviation = _error(block, test or train[:1])
    kept = [p.detach().clone() for p in moving]
    scales = [max(float(p.detach().double().square().mean().sqrt()), 1e-8) for p in moving]
    rate, steps, after = how.rate, 0, before
    for rate in (how.rate, how.rate / RETRY, how.rate / RETRY**2):
        steps += _descend(block, how, rate, train, moving, scales, deviation, order, project)
        after = _error(block, test)[0] if test else 0.0
        if after < before or not test:
            break
        with torch.no_grad():
            for p, old in zip(moving, kept, strict=True):
                p.copy_(old)
    return {"before": before, "after": after, "rate": rate, "steps": steps, "kept": after < before or not test}


def _descend(
    block: Block,
    how: Tuning,
    rate: float,
    train: Sequence[int],
    moving: Sequence[torch.nn.Parameter],
    scales: Sequence[float],
    deviation: float,
    order: torch.Generator,
    project: Callable[[], None],
) -> int:
    """All epochs at that rate; the number of steps."""
    groups = [{"params": [p], "lr": rate * s, "peak": rate * s} for p, s in zip(moving, scales, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), foreach=True)
    steps, step = how.epochs * -(-len(train) // how.batch), 0
    for p in moving:
        p.requires_grad_(True)
    try:
        for _ in range(how.epochs):
            shuffled = torch.randperm(len(train), generator=order).tolist()
            for start in range(0, len(train), how.batch):
                rows = sorted(train[i] for i in shuffled[start : start + how.batch])
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * (1 - step / steps)
                _gradients(block, rows, moving, deviation)
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    project()
                step += 1
    finally:
        for p in moving:
            p.requires_grad_(False)
            p.grad = None
    return step


def _gradients(block: Block, rows: Sequence[int], moving: Sequence[torch.nn.Parameter], deviation: float) -> None:
    """Gradients of the loss on those samples; of several processes each takes some of them."""
    ranks = block.sweep.ranks
    if mine := ranks.mine(rows):
        with torch.enable_grad():
            output, target = _parts(block, mine)
            loss = (output - target).float().square().mean() / deviation * (len(mine) / len(rows))
            loss.backward()  # type: ignore[no-untyped-call]
    if ranks.world > 1:
        for p in moving:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            ranks.add(p.grad)


def _parts(block: Block, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output as the block is, and target, of those samples; of padded ones the tokens that count."""
    sweep = block.sweep
    assert block.targets is not None
    target = block.targets.read(rows).to(sweep.device)
    output = block.forward(rows, block.inputs.read(rows).to(sweep.device))
    if (mask := sweep.mask(rows)) is not None:
        return output[mask], target[mask]
    return output, target


def _error(block: Block, rows: Sequence[int]) -> tuple[float, float]:
    """Squared error over the squared deviation of the targets, over all those samples; and the deviation per value."""
    total, scale, count = 0.0, 0.0, 0
    mine = block.sweep.ranks.mine(rows)
    with torch.no_grad():
        for start in range(0, len(mine), 8):
            output, target = _parts(block, mine[start : start + 8])
            total += float((output - target).float().square().sum())
            scale += float((target.float() - target.float().mean()).square().sum())
            count += target.numel()
    total, scale, values = block.sweep.ranks.total(total, scale, count)
    return (total / scale, scale / values) if scale else (0.0, 1.0)
