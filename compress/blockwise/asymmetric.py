"""Statistics for asymmetric calibration (GPTAQ, arXiv 2504.02692): how earlier changes moved the inputs of each matrix.

Groups are measured in the order in which they read. Each is changed before the next is measured, so later ones see the
errors of earlier ones and can compensate for them. I inputs and O outputs of a matrix, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any

import torch

from compress.blockwise.activations import Activations
from compress.blockwise.block import Block
from compress.blockwise.experts import unfused
from compress.blockwise.hessians import InputStatistics, counted, hessian_dtype
from compress.blockwise.linears import TargetLinear, first_value, record_outputs
from compress.blockwise.streamed import StopForward

#: Largest part of a block's output less its input that the matrices that write to the residual stream may leave unexplained.
_UNEXPLAINED = 1e-4


@dataclass
class InputMismatch:
    """Sums over tokens; x and r belong to the original, x̂ and r̂ to the model as it is now.

    Attributes:
        inputs: Σ (x - x̂) x̂ᵀ [I, I].
        residual: Σ (r - r̂) x̂ᵀ [O, I] by the name of each linear that writes to the residual stream; its outputs are added
            to r.
    """

    inputs: torch.Tensor
    residual: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ChangedTensor:
    """A tensor of the block that has been changed, with its values before and after."""

    tensor: torch.Tensor
    before: torch.Tensor
    now: torch.Tensor


def asymmetric_statistics(
    block: Block,
) -> Iterator[tuple[list[TargetLinear], InputStatistics, InputMismatch | None, bool]]:
    """Yield each group, its H = Σ x̂ x̂ᵀ, its mismatch, and whether the block may be changed now.

    The caller changes the group's matrices before it asks for the next group. Each group takes two passes through the block,
    as far as the group. Groups that do not read every token exactly once (experts) come last, without mismatch; see
    `Block.statistics`.
    """
    once, writers = _single_readers(block)
    changed: list[ChangedTensor] = []
    for group in list(once):
        measured = measure(block, group, writers, changed)
        if measured is None:
            once.remove(group)
            continue
        statistics, mismatch = measured
        before = [linear.weight.clone() for linear in group]
        yield group, statistics, mismatch, True
        changed += [ChangedTensor(s.weight, w, s.weight.clone()) for s, w in zip(group, before, strict=True)]
    if rest := [group for group in block.groups if group not in once]:
        for group, statistics, free in block.statistics(groups=rest):
            yield group, statistics, None, free


def statistics_of(block: Block) -> Iterator[tuple[list[TargetLinear], InputStatistics, InputMismatch | None, bool]]:
    """`asymmetric_statistics` in a run with targets, else `symmetric_statistics`."""
    return asymmetric_statistics(block) if block.originals is not None else symmetric_statistics(block)


def symmetric_statistics(
    block: Block,
) -> Iterator[tuple[list[TargetLinear], InputStatistics, InputMismatch | None, bool]]:
    """`Block.statistics`, with None for each group's mismatch."""
    for group, statistics, free in block.statistics():
        yield group, statistics, None, free


def _single_readers(block: Block) -> tuple[list[list[TargetLinear]], list[TargetLinear]]:
    """The groups that read once in a pass, and the linears that write to the residual stream, both in order of reading.

    The writers are the one or two linears whose outputs added to the block's input make its output; none where there are no
    such.
    """
    linears = [linear for group in block.groups for linear in group if linear.owner is None]
    with torch.no_grad(), unfused(block.swaps), record_outputs(linears) as outputs:
        hidden = block.read_inputs([0])
        output = block.forward([0], hidden)
    order = list(outputs)
    once = [g for g in block.groups if all(s.owner is None and len(outputs.get(s.name, ())) == 1 for s in g)]
    once.sort(key=lambda group: order.index(group[0].name))
    singles = sorted(chain.from_iterable(once), key=lambda linear: order.index(linear.name))
    if output.shape != hidden.shape:
        return once, []
    wanted = (output - hidden).float()
    written = {s.name: outputs[s.name][0].float() for s in singles}
    fitting = [s for s in singles if not s.kernel and written[s.name].numel() == wanted.numel()]
    bound = _UNEXPLAINED * float(wanted.abs().max())
    for writers in (list(w) for count in (1, 2) for w in combinations(fitting, count)):
        left = wanted - sum(written[s.name].view(wanted.shape) for s in writers)
        if float(left.abs().max()) <= bound:
            return once, writers
    return once, []


def measure(
    block: Block, group: list[TargetLinear], writers: Sequence[TargetLinear], changed: Sequence[ChangedTensor]
) -> tuple[InputStatistics, InputMismatch] | None:
    """Statistics and mismatch of a group, from passes through the block as it is and as it was before ``changed``.

    None where the two read other numbers of tokens, as experts do that a router sends others.

    Args:
        writers: linears that write to the residual stream, in order.
    """
    assert block.originals is not None
    width = group[0].weight.shape[1]

    def zeros(rows: int) -> torch.Tensor:
        return torch.zeros(rows, width, dtype=hessian_dtype(width), device=block.view.device)

    statistics = InputStatistics(zeros(width))
    mismatch = InputMismatch(zeros(width), {s.name: zeros(len(s.weight)) for s in group if s in writers})
    earlier = writers[: writers.index(group[0])] if group[0] in writers else []
    differing = 0
    for rows in block.view.batches():
        now, residual_now = _read(block, group[0], earlier, block.inputs, rows)
        with _restored(changed):
            then, residual_then = _read(block, group[0], earlier, block.originals, rows)
        if len(then) != len(now) or (mismatch.residual and len(residual_now) != len(now)):
            differing += 1
            continue
        statistics.add(now)
        mismatch.inputs += (then - now).T @ now
        for total in mismatch.residual.values():
            total += (residual_then - residual_now).T @ now
    if block.view.processes.reduce_sum(differing)[0]:
        return None
    statistics.finish()
    block.sum_over_processes(statistics, mismatch.inputs, *mismatch.residual.values())
    block.add_shared_inputs(group, statistics)
    return statistics, mismatch


def _read(
    block: Block, linear: TargetLinear, earlier: Sequence[TargetLinear], inputs: Activations, rows: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of a linear [T, I], and the residual stream behind ``earlier`` ones [T, hidden]; float32, without padding."""
    hidden = inputs.read(rows).to(block.view.device)
    forward = block.forward_original if inputs is block.originals else block.forward
    residual = hidden.float().reshape(-1, hidden.shape[-1])
    read: list[torch.Tensor] = []

    def stop(module: Any, args: tuple[Any, ...]) -> None:
        read.append(args[0].float())
        raise StopForward

    def adder(one: TargetLinear) -> Callable[..., None]:
        def add(module: Any, args: tuple[Any, ...], output: Any) -> None:
            nonlocal residual
            residual = residual + one.rows(first_value(output).float())

        return add

    handles = [s.module.register_forward_hook(adder(s)) for s in earlier]
    handles.append(linear.module.register_forward_pre_hook(stop))
    try:
        with torch.no_grad(), unfused(block.swaps), suppress(StopForward):
            forward(rows, hidden)
    finally:
        for handle in handles:
            handle.remove()
    masks = block.token_masks(rows)
    # an expert may have no tokens
    inside = linear.rows(read[0]) if read else residual.new_zeros(0, linear.weight.shape[1])
    return counted(inside, masks), counted(residual, masks)


@contextmanager
def _restored(changed: Sequence[ChangedTensor]) -> Iterator[None]:
    """Within, the tensors have their values before the change."""
    try:
        for one in changed:
            one.tensor.copy_(one.before)
        yield
    finally:
        for one in changed:
            one.tensor.copy_(one.now)
