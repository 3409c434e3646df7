"""Block reconstruction: training a changed block towards the original's output, on the calibration samples.

Solvers see one matrix at a time, on inputs that the changed blocks before it output. Reconstruction trains all float tensors
of a block (kept weights, norms, biases) together, against the original's own activations. BRECQ (arXiv 2102.05426) and
AutoRound (arXiv 2309.05516) do so for quantised models; this works for any change that is a projection of the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress.blockwise.block import Block
from compress.blockwise.memory_budget import HELD_OUT, SAMPLES_PER_STEP

#: Where the held-out error does not fall, training starts again at a rate so many times lower, at most twice.
RETRY = 4


@dataclass(frozen=True)
class Reconstruction:
    """Settings of block reconstruction.

    Attributes:
        epochs: passes over the samples; 0 for none. rate: Adam's step, relative to the root mean square of each tensor.
        batch: samples per step.
    """

    epochs: int = 5
    rate: float = 0.04
    batch: int = SAMPLES_PER_STEP["floats"]


@dataclass(frozen=True)
class TrainableTensor:
    """A tensor to train, and its step at a rate of 1."""

    tensor: torch.Tensor
    unit: float


def trainable_floats(block: Block, without: Collection[int] = ()) -> list[TrainableTensor]:
    """The block's float parameters, with the root mean square of their values as unit.

    Args:
        without: ids of parameters to leave out, besides those that other blocks share.
    """
    excluded = {*without, *block.frozen}
    parameters = [p for p in block.module.parameters() if p.is_floating_point() and id(p) not in excluded]
    return [TrainableTensor(p, max(float(p.detach().double().square().mean().sqrt()), 1e-8)) for p in parameters]


def reconstruct_block(
    block: Block,
    options: Reconstruction,
    trainable: Sequence[TrainableTensor],
    project: Callable[[], None],
    chain_gradients: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train a block in place.

    The loss is the mean squared difference to ``block.targets`` over their variance. The optimiser is Adam, with a rate that
    falls linearly to zero. If the error on held-out samples does not fall, all tensors are restored and training starts again
    at a lower rate; if no rate lowers it, the block stays as it was.

    Args:
        trainable: the tensors to train: parameters of the block, or tensors that its weights are computed from.
        project: called after every step; brings the block's weights back to allowed values: zeros, or rounded values.
        chain_gradients: called before every step; sets the gradients of ``trainable`` from those of the block's weights.

    Returns:
        ``before`` and ``after``: relative error on the held-out samples; ``rate``: the last one tried; ``steps``: in all;
        ``kept``: whether the error fell; ``seconds``.
    """
    start = time.perf_counter()
    assert block.targets is not None
    if not block.runs:
        return {"before": 0.0, "after": 0.0, "rate": options.rate, "steps": 0, "kept": False, "seconds": 0.0}
    order = torch.Generator().manual_seed(block.view.seed * 1_000_003 + block.index)
    samples = torch.randperm(block.view.samples, generator=order).tolist()
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
    """Train for all epochs at that rate; the number of steps."""
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
    """Add the gradients of the loss on those samples; of several processes each takes some of them."""
    processes = block.view.processes
    if own := processes.shard(rows):
        with torch.enable_grad():
            output, target = _output_and_target(block, own)
            loss = (output - target).float().square().mean() / deviation * (len(own) / len(rows))
            loss.backward()  # type: ignore[no-untyped-call]
    if processes.world > 1:
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            processes.all_reduce(p.grad)


def _output_and_target(block: Block, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of the block as it is, and target, of those samples; of padded ones the tokens that count."""
    assert block.targets is not None
    target = block.targets.read(rows).to(block.view.device)
    output = block.forward(rows, block.read_inputs(rows))
    if (mask := block.token_mask(rows)) is not None:
        return output[mask], target[mask]
    return output, target


def _error(block: Block, rows: Sequence[int]) -> tuple[float, float]:
    """Squared error over the squared deviation of the targets, over all those samples; and the deviation per value."""
    total, scale, count = 0.0, 0.0, 0
    own = block.view.processes.shard(rows)
    with torch.no_grad():
        for start in range(0, len(own), 8):
            output, target = _output_and_target(block, own[start : start + 8])
            total += float((output - target).float().square().sum())
            scale += float((target.float() - target.float().mean()).square().sum())
            count += target.numel()
    total, scale, values = block.view.processes.reduce_sum(total, scale, count)
    return (total / scale, scale / values) if scale else (0.0, 1.0)
