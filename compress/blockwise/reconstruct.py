"""Moving a changed block towards the output that the original model has there, by gradient on the calibration samples.

What solvers leave to be done: they see one matrix at a time, and inputs as the blocks before have made them; here all float
tensors of a block (weights that are kept, norms, biases) move together, against the original's own activations. As in
block-wise reconstruction of quantised models (BRECQ, arXiv 2102.05426; AutoRound, arXiv 2309.05516), for any change that is
a projection of the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from compress.blockwise.runner import Block

#: Where tuning does not pay, it is tried again at a rate so many times lower, twice.
RETRY = 4
#: Share of the samples that are held out to see whether tuning pays; at least one.
HELD_OUT = 1 / 16


@dataclass(frozen=True)
class Reconstruction:
    """How to tune a block.

    Attributes:
        epochs: passes over the samples; 0 for none. rate: Adam's step, relative to the root mean square of each tensor.
        batch: samples of one step.
    """

    epochs: int = 5
    rate: float = 0.04
    batch: int = 4


@dataclass(frozen=True)
class TrainableTensor:
    """A tensor that tuning moves, and the step that a rate of 1 means for it."""

    tensor: torch.Tensor
    unit: float


def trainable_floats(block: Block, without: Collection[int] = ()) -> list[TrainableTensor]:
    """Every float parameter of the block by the root mean square of its values, but shared ones and those of these ids."""
    left = {*without, *block.frozen}
    parameters = [p for p in block.module.parameters() if p.is_floating_point() and id(p) not in left]
    return [TrainableTensor(p, max(float(p.detach().double().square().mean().sqrt()), 1e-8)) for p in parameters]


def reconstruct_block(
    block: Block,
    options: Reconstruction,
    trainable: Sequence[TrainableTensor],
    project: Callable[[], None],
    chain_gradients: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Tune a block in place.

    The loss is the mean squared difference to ``block.targets`` over their variance. Steps are Adam's, with a rate that falls
    linearly to zero. Some samples are held out: if the error there ends no lower than it began, everything is put back and
    tried at lower rates, and left as it was if none pays.

    Args:
        moving: what moves, tensors of the block or such as its weights are made of.
        project: called after every step; brings the block's weights to where they may be: zeros, or rounded values.
        collect: called before every step; makes gradients of what moves from those of the block's weights.

    Returns:
        ``before`` and ``after``: relative error on the held-out samples; ``rate`` tried last; ``steps`` in all; ``kept``:
        whether it paid; ``seconds``.
    """
    start = time.perf_counter()
    runner = block.runner
    assert block.targets is not None
    order = torch.Generator().manual_seed(runner.seed * 1_000_003 + block.index)
    samples = torch.randperm(runner.inputs.samples, generator=order).tolist()
    held = max(1, round(HELD_OUT * len(samples))) if len(samples) > 1 else 0
    test, train = samples[:held], samples[held:]
    before, deviation = _error(block, test or train[:1])
    kept = [m.tensor.detach().clone() for m in trainable]
    rate, steps, after = options.rate, 0, before
    for rate in (options.rate, options.rate / RETRY, options.rate / RETRY**2):
        steps += _descend(block, options, rate, train, trainable, deviation, order, project, chain_gradients)
        after = _error(block, test)[0] if test else 0.0
        if after < before or not test:
            break
        with torch.no_grad():
            for m, old in zip(trainable, kept, strict=True):
                m.tensor.copy_(old)
            project()
    return {
        "before": before,
        "after": after,
        "rate": rate,
        "steps": steps,
        "kept": after < before or not test,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _descend(
    block: Block,
    options: Reconstruction,
    rate: float,
    train: Sequence[int],
    trainable: Sequence[TrainableTensor],
    deviation: float,
    order: torch.Generator,
    project: Callable[[], None],
    chain_gradients: Callable[[], None] | None,
) -> int:
    """All epochs at that rate; the number of steps."""
    groups = [{"params": [m.tensor], "lr": rate * m.unit, "peak": rate * m.unit} for m in trainable]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), foreach=True)
    steps, step = options.epochs * -(-len(train) // options.batch), 0
    parameters = [p for p in block.module.parameters() if p.is_floating_point()]
    for p in parameters:
        p.requires_grad_(True)
    try:
        for _ in range(options.epochs):
            shuffled = torch.randperm(len(train), generator=order).tolist()
            for start in range(0, len(train), options.batch):
                rows = sorted(train[i] for i in shuffled[start : start + options.batch])
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * (1 - step / steps)
                _gradients(block, rows, parameters, deviation)
                with torch.no_grad():
                    if chain_gradients is not None:
                        chain_gradients()
                    optimizer.step()
                    for p in parameters:
                        p.grad = None
                    project()
                step += 1
    finally:
        for p in parameters:
            p.requires_grad_(False)
            p.grad = None
    return step


def _gradients(block: Block, rows: Sequence[int], parameters: Sequence[torch.nn.Parameter], deviation: float) -> None:
    """Gradients of the loss on those samples; of several processes each takes some of them."""
    processes = block.runner.processes
    if mine := processes.shard(rows):
        with torch.enable_grad():
            output, target = _parts(block, mine)
            loss = (output - target).float().square().mean() / deviation * (len(mine) / len(rows))
            loss.backward()  # type: ignore[no-untyped-call]
    if processes.world > 1:
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            processes.all_reduce(p.grad)


def _parts(block: Block, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output as the block is, and target, of those samples; of padded ones the tokens that count."""
    runner = block.runner
    assert block.targets is not None
    target = block.targets.read(rows).to(runner.device)
    if runner.teacher is not None:
        target = runner.teacher.view(target)
    output = block.forward(rows, block.inputs.read(rows).to(runner.device))
    if (mask := runner.mask(rows)) is not None:
        return output[mask], target[mask]
    return output, target


def _error(block: Block, rows: Sequence[int]) -> tuple[float, float]:
    """Squared error over the squared deviation of the targets, over all those samples; and the deviation per value."""
    total, scale, count = 0.0, 0.0, 0
    mine = block.runner.processes.shard(rows)
    with torch.no_grad():
        for start in range(0, len(mine), 8):
            output, target = _parts(block, mine[start : start + 8])
            total += float((output - target).float().square().sum())
            scale += float((target.float() - target.float().mean()).square().sum())
            count += target.numel()
    total, scale, values = block.runner.processes.reduce_sum(total, scale, count)
    return (total / scale, scale / values) if scale else (0.0, 1.0)
