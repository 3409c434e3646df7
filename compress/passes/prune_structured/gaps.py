"""Least squares where blocks were removed: the last matrix of the block before a gap takes over what it can.

The block's output is the sum of the residual stream and of that matrix's outputs. So what the removed blocks would have added
is a regression on the matrix's own inputs. ReplaceMe (arXiv 2505.02819) estimates a map of the outputs in the same place.

Letters: O outputs, I inputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from compress.blockwise.block import Block
from compress.blockwise.details import GapDetails
from compress.blockwise.hessians import counted, hessian_dtype
from compress.blockwise.linears import TargetLinear, first_value
from compress.solvers.ridge import RegressionSums, ridge_change

#: One of so many samples is held out to choose the ridge.
_HELD_OUT = 8
#: Part of a change of the last matrix's outputs that may not arrive at the block's output.
_LOST = 1e-2


def fill_gap(block: Block) -> GapDetails | None:
    """Add to the last matrix of a block, and to its bias, what lowers the squared difference to ``block.targets``.

    Returns:
        For the report: the matrix, and the squared difference over the targets' variance ``before`` and ``after``. None where
        no matrix writes straight to the block's output (a norm follows it, or experts), or no change helps.
    """
    if (last := _last_linear(block)) is None:
        return None
    linear, factor = last
    bias = _bias(linear)
    sums = _sums(block, linear, factor)
    mask = block.earlier_mask(linear)

    def project(D_OI: torch.Tensor) -> torch.Tensor:
        if mask is not None:
            D_OI[:, : mask.shape[1]].masked_fill_(~mask, 0)
        return D_OI

    change_OI = ridge_change(sums.fit, sums.held, project)
    row: GapDetails | None = None
    processes = block.view.processes
    if processes.broadcast_object(0, change_OI is not None):
        change_OI = torch.zeros_like(sums.fit.C_OI) if change_OI is None else change_OI
        processes.broadcast(0, change_OI)
        before, after = sums.fit.energy + sums.held.energy, sums.fit.left(change_OI) + sums.held.left(change_OI)
        row = {"matrix": linear.name, "before": before / sums.variance, "after": after / sums.variance}
        change_OI = change_OI.to(linear.weight.dtype)
        linear.weight.add_(change_OI[:, : linear.weight.shape[1]])
        if bias is not None:
            bias.add_(change_OI[:, -1])
    return row


def _bias(linear: TargetLinear) -> torch.Tensor | None:
    bias = getattr(linear.module, "bias", None)
    return bias.data if isinstance(bias, torch.nn.Parameter) else None


def _last_linear(block: Block) -> tuple[TargetLinear, float] | None:
    """The linear whose outputs, times a factor, are added to the block's output; and the factor."""
    if not block.runs:
        return None
    linears, rows = {linear.name: linear for linear in block.linears}, [0]
    with torch.no_grad():
        inputs = block.read_inputs(rows)
        before = block.forward(rows, inputs)
        change = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).to(before) * before.abs().mean()
        for linear in (linears[name] for name in reversed(block.once)):
            if linear.owner is not None or any(id(p) in block.frozen for p in linear.module.parameters()):
                continue
            with _added(linear, change):
                arrived = block.forward(rows, inputs) - before
            factor = float((arrived * change).sum() / change.square().sum())
            if factor > _LOST and float((arrived - factor * change).norm()) <= _LOST * factor * float(change.norm()):
                return linear, factor
    return None


@contextmanager
def _added(linear: TargetLinear, change: torch.Tensor) -> Iterator[None]:
    """Within, a change of as many values is added to the outputs of a linear."""

    def changed(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + change.view(output.shape) if output.numel() == change.numel() else output

    handle = linear.module.register_forward_hook(changed)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class _Sums:
    """Sums over the samples to fit and over those held out, and the squares of the targets less their mean."""

    fit: RegressionSums
    held: RegressionSums
    variance: float


def _sums(block: Block, linear: TargetLinear, factor: float) -> _Sums:
    """Sums over all samples of the linear's inputs times a factor, 1 for its bias, and of what the block's output lacks."""
    assert block.targets is not None
    device, biased = block.view.device, _bias(linear) is not None
    outputs, width = linear.weight.shape
    fit, held = (RegressionSums.empty(outputs, width + biased, hessian_dtype(width), device) for _ in range(2))
    inputs: list[torch.Tensor] = []
    handle = linear.module.register_forward_pre_hook(lambda module, args: inputs.append(first_value(args)))
    total, squares = torch.zeros(outputs, dtype=torch.float64, device=device), 0.0
    try:
        with torch.no_grad():
            for rows in block.view.batches():
                for part, sums in zip(_divided(rows), (fit, held), strict=True):
                    if not part:
                        continue
                    output, target = block.forward(part, block.read_inputs(part)), block.targets.read(part).to(device)
                    masks = block.token_masks(part)
                    missing, wanted = (
                        counted(t.reshape(-1, outputs), masks).float() for t in (target - output, target)
                    )
                    x_TI = factor * counted(linear.rows(inputs.pop()), masks).float()
                    sums.add(torch.cat([x_TI, x_TI.new_full((len(x_TI), biased), factor)], 1), missing)
                    total += wanted.double().sum(0)
                    squares += float(wanted.double().square().sum())
    finally:
        handle.remove()
    processes = block.view.processes
    for sums in (fit, held):
        processes.all_reduce(sums.H_II, sums.C_OI)
        sums.energy, tokens = processes.reduce_sum(sums.energy, sums.tokens)
        sums.tokens = int(tokens)
    processes.all_reduce(total)
    (squares,) = processes.reduce_sum(squares)
    variance = squares - float(total.square().sum()) / max(1, fit.tokens + held.tokens)
    return _Sums(fit, held, max(variance, 1e-30))


def _divided(rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """Samples to fit and samples to hold out."""
    return [r for r in rows if r % _HELD_OUT], [r for r in rows if not r % _HELD_OUT]
