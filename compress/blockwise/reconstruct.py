"""Block reconstruction: training a changed block towards the original's output, on the calibration samples.

Solvers see one matrix at a time, on inputs that the changed blocks before it output. Reconstruction trains all float tensors
of a block (kept weights, norms, biases) together, against the original's own activations. BRECQ (arXiv 2102.05426) and
AutoRound (arXiv 2309.05516) do so for quantised models; this works for any change that is a projection of the weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from compress.blockwise.block import Block
from compress.blockwise.memory_budget import HELD_OUT, SAMPLES_PER_STEP, SAVED_BYTES
from compress.blockwise.predictions import Predict, depends_on_hidden_alone, divergence
from compress.blockwise.spilled import SpilledValues, spilling_backward
from compress.memory import give_back_freed

#: Where the held-out error does not fall, training starts again at a rate so many times lower, at most twice.
RETRY = 4
#: Below this width of the hidden states products take too little of the time for bfloat16 to pay.
_NARROW = 128
#: Weights from which on a block's step takes seconds.
_LARGE = 1 << 26


@dataclass(frozen=True)
class Reconstruction:
    """Settings of block reconstruction.

    Attributes:
        epochs: passes over the samples, the last one in part; 0 for none.
        rate: Adam's step, relative to the root mean square of each tensor.
        batch: samples per step. bfloat16: train with products in bfloat16, where the machine has units for them.
        predictions: train the last block towards the original's predictions, at lower rates, where it alone decides them.
    """

    epochs: float = 5
    rate: float = 0.04
    batch: int = SAMPLES_PER_STEP["floats"]
    bfloat16: bool = True
    predictions: bool = False


@dataclass(frozen=True)
class TrainableTensor:
    """A tensor to train, and its step at a rate of 1."""

    tensor: torch.Tensor
    unit: float


@dataclass(frozen=True)
class ComputedParameter:
    """A parameter of the block that is computed from trainable tensors.

    Attributes:
        tensors: those that are trained. chain: sets their gradients from that of the parameter.
    """

    parameter: torch.nn.Parameter
    tensors: Sequence[torch.Tensor]
    chain: Callable[[], None]


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
    derived: Sequence[ComputedParameter] = (),
) -> dict[str, Any]:
    """Train a block in place.

    The loss is the mean squared difference to ``block.targets`` over their variance; for predictions their mean KL divergence
    from those that ``block.targets`` give, in nats per token. The optimiser is Adam, with a rate that
    falls linearly to zero. If the error on held-out samples does not fall, all tensors are restored and training starts again
    at a lower rate; if no rate lowers it, the block stays as it was.

    Args:
        trainable: the tensors to train: parameters of the block, or tensors that its weights are computed from.
        project: called after every step; brings the block's weights back to allowed values: zeros, or rounded values.
        derived: parameters that are computed from tensors of ``trainable``.

    Returns:
        ``before`` and ``after``: that loss on the held-out samples; ``rate``: the last one tried; ``steps``: in all;
        ``kept``: whether the error fell; ``seconds``.
    """
    start = time.perf_counter()
    assert block.targets is not None
    if not block.runs:
        return {"before": 0.0, "after": 0.0, "rate": options.rate, "steps": 0, "kept": False, "seconds": 0.0}
    with block.view.predictions(block.index) if options.predictions else nullcontext() as predict:
        if predict is not None and not (
            block.view.samples > 1 and depends_on_hidden_alone(predict, _target(block, [0]))
        ):
            predict = None
        result = _reconstruct(block, options, trainable, project, derived, predict)
    return {**result, "seconds": round(time.perf_counter() - start, 3)}


def _reconstruct(
    block: Block,
    options: Reconstruction,
    trainable: Sequence[TrainableTensor],
    project: Callable[[], None],
    derived: Sequence[ComputedParameter],
    predict: Predict | None,
) -> dict[str, Any]:
    """Train, held out against restored tensors; see `reconstruct_block`. ``predict``: compare what it gives."""
    order = torch.Generator().manual_seed(block.view.seed * 1_000_003 + block.index)
    samples = torch.randperm(block.view.samples, generator=order).tolist()
    held = max(1, round(HELD_OUT * len(samples))) if len(samples) > 1 else 0
    test, train = samples[:held], samples[held:]
    before, deviation = _error(block, test or train[:1], predict)
    kept = SpilledValues(block.inputs.path.parent, [m.tensor for m in trainable])
    peak = options.rate if predict is None else options.rate / RETRY
    rate, steps, after = peak, 0, before
    for rate in (peak, peak / RETRY, peak / RETRY**2):
        steps += _descend(block, options, rate, train, trainable, deviation, order, project, derived, predict)
        after = _error(block, test, predict)[0] if test else 0.0
        if after < before or not test:
            break
        with torch.no_grad():
            kept.restore()
            project()
    kept.close()
    return {"before": before, "after": after, "rate": rate, "steps": steps, "kept": after < before or not test}


def _descend(
    block: Block,
    options: Reconstruction,
    rate: float,
    train: Sequence[int],
    trainable: Sequence[TrainableTensor],
    deviation: float,
    order: torch.Generator,
    project: Callable[[], None],
    derived: Sequence[ComputedParameter],
    predict: Predict | None,
) -> int:
    """Train for all epochs at that rate; the number of steps."""
    parameters = [p for p in block.module.parameters() if p.is_floating_point()]
    optimizers = {id(m.tensor): _adam(m, rate) for m in trainable}
    reduced = options.bfloat16 and runs_in_bfloat16(block, train[:1])
    steps, step = math.ceil(options.epochs * -(-len(train) // options.batch)), 0
    with _with_gradients(block, parameters, optimizers, derived):
        while step < steps:
            shuffled = torch.randperm(len(train), generator=order).tolist()
            for start in range(0, min(len(train), (steps - step) * options.batch), options.batch):
                rows = sorted(train[i] for i in shuffled[start : start + options.batch])
                for optimizer in optimizers.values():
                    (group,) = optimizer.param_groups
                    group["lr"] = group["peak"] * (1 - step / steps)
                _gradients(block, rows, parameters, deviation, predict, reduced)
                with torch.no_grad():
                    for one in derived if block.view.processes.world > 1 else ():
                        one.chain()
                    for optimizer in optimizers.values():
                        optimizer.step()  # skips what has no gradient, or no longer
                    for p in parameters:
                        p.grad = None
                    project()
                step += 1
    return step


def _adam(one: TrainableTensor, rate: float) -> torch.optim.Adam:
    """The optimiser of one tensor; what is computed on the way is as large as that tensor."""
    peak = rate * one.unit
    return torch.optim.Adam([{"params": [one.tensor], "lr": peak, "peak": peak}], betas=(0.9, 0.95), fused=True)


@contextmanager
def _with_gradients(
    block: Block,
    parameters: Sequence[torch.nn.Parameter],
    optimizers: Mapping[int, torch.optim.Optimizer],
    derived: Sequence[ComputedParameter],
) -> Iterator[None]:
    """Within, the parameters have gradients. In one process each is stepped as soon as it has its own, which is then freed.

    Args:
        optimizers: by the id of the tensor. derived: what is stepped as soon as its parameter has a gradient.
    """
    tensors: dict[int, list[ComputedParameter]] = {}
    for one in derived:
        tensors.setdefault(id(one.parameter), []).append(one)

    def step(p: torch.Tensor) -> None:
        with torch.no_grad():
            for one in tensors.get(id(p), ()):
                one.chain()
                for tensor in one.tensors:
                    optimizers[id(tensor)].step()
                    tensor.grad = None
        if (optimizer := optimizers.get(id(p))) is not None:
            optimizer.step()
        p.grad = None

    alone = block.view.processes.world == 1
    for p in parameters:
        p.requires_grad_(True)
    handles = [p.register_post_accumulate_grad_hook(step) for p in parameters if alone]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p in parameters:
            p.requires_grad_(False)
            p.grad = None


def runs_in_bfloat16(block: Block, rows: Sequence[int]) -> bool:
    """Whether float32 products of a block may be in bfloat16: the machine has units, and the code copes with both dtypes."""
    device, hidden = torch.device(block.view.device).type, block.read_inputs(rows)
    if hidden.dtype != torch.float32 or hidden.shape[-1] < _NARROW or not _has_units(device):
        return False
    try:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            return bool(block.forward(rows, hidden).isfinite().all())
    except RuntimeError:  # an operation that wants one dtype for all that it reads
        return False


def _has_units(device: str) -> bool:
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _gradients(
    block: Block,
    rows: Sequence[int],
    parameters: Sequence[torch.nn.Parameter],
    deviation: float,
    predict: Predict | None,
    reduced: bool,
) -> None:
    """Add the gradients of the loss on those samples; of several processes each takes some of them.

    Args:
        reduced: the block's products are in bfloat16; sums, weights and their gradients are as they were.
    """
    processes = block.view.processes
    if own := processes.shard(rows):
        _trim(parameters)
        most = SAVED_BYTES + block.view.room.left
        with torch.enable_grad(), spilling_backward(block.inputs.path.parent, parameters, most):
            # each weight is used once: nothing is gained by holding all their copies in bfloat16 until the loss
            products = torch.autocast(
                torch.device(block.view.device).type, torch.bfloat16, enabled=reduced, cache_enabled=False
            )
            if predict is None:
                with products:
                    output, target = _output_and_target(block, own)
                loss = (output - target).float().square().mean() / deviation * (len(own) / len(rows))
                _trim(parameters)
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                with products:
                    output = block.forward(own, block.read_inputs(own))
                gradients = _gradients_of_predictions(block, own, output.detach(), predict) / len(rows)
                _trim(parameters)
                output.backward(gradients)  # type: ignore[no-untyped-call]
    if processes.world > 1:
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            processes.all_reduce(p.grad)


def _trim(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Return what the allocator keeps to the system, where the block is so large that this takes a small part of a step."""
    if parameters and parameters[0].device.type == "cpu" and sum(p.numel() for p in parameters) >= _LARGE:
        give_back_freed()


def _gradients_of_predictions(
    block: Block, rows: Sequence[int], output: torch.Tensor, predict: Predict
) -> torch.Tensor:
    """Gradients of the samples' mean divergences by the block's output, shaped as that; logits of one sample at a time."""
    output.requires_grad_(True)
    for number, row in enumerate(rows):
        total, tokens = _divergence(block, row, output[number : number + 1], predict)
        (total / max(tokens, 1)).backward()  # type: ignore[no-untyped-call]
    assert output.grad is not None
    return output.grad


def _divergence(block: Block, row: int, output: torch.Tensor, predict: Predict) -> tuple[torch.Tensor, int]:
    """Divergence of a sample's predictions, summed over the tokens that count, and the number of these."""
    with torch.no_grad():
        expected = predict([row], _target(block, [row]))
    mask = block.token_mask([row])
    tokens = expected.shape[1] if mask is None else int(mask.sum())
    return divergence(expected, predict([row], output), mask), tokens


def _target(block: Block, rows: Sequence[int]) -> torch.Tensor:
    assert block.targets is not None
    return block.targets.read(rows).to(block.view.device)


def _output_and_target(block: Block, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of the block as it is, and target, of those samples; of padded ones the tokens that count."""
    target = _target(block, rows)
    output = block.forward(rows, block.read_inputs(rows))
    if (mask := block.token_mask(rows)) is not None:
        return output[mask], target[mask]
    return output, target


def _error(block: Block, rows: Sequence[int], predict: Predict | None) -> tuple[float, float]:
    """The loss over all those samples, and the deviation per value of the targets; 1 for predictions."""
    total, scale, count = 0.0, 0.0, 0
    own = block.view.processes.shard(rows)
    with torch.no_grad():
        for row in own if predict is not None else ():
            assert predict is not None
            lost, tokens = _divergence(block, row, block.forward([row], block.read_inputs([row])), predict)
            total, scale, count = total + float(lost), scale + tokens, count + tokens
        for start in range(0, len(own) if predict is None else 0, 8):
            output, target = _output_and_target(block, own[start : start + 8])
            total += float((output - target).float().square().sum())
            scale += float((target.float() - target.float().mean()).square().sum())
            count += target.numel()
    total, scale, values = block.view.processes.reduce_sum(total, scale, count)
    return (total / scale, scale / values) if scale else (0.0, 1.0)
