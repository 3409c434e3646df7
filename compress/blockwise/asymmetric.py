"""Statistics of a block beside the original's: what earlier changes have done to the inputs of each matrix.

Group by group in the order of reading: each is to be changed before the next is measured, so that later ones see what
earlier ones have done, and can make up for it. I inputs and O outputs of a matrix, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any

import torch

from compress.blockwise.activations import Activations
from compress.blockwise.linears import InputStatistics, StopForward, TargetLinear, record_outputs, unfused
from compress.blockwise.runner import Block, summing_dtype

#: Of a block's output less its input: how much the matrices that write to the residual stream may leave unexplained.
_UNEXPLAINED = 1e-4


@dataclass
class InputMismatch:
    """Sums over tokens; x and r are what the original has, x̂ and r̂ what there is now.

    Attributes:
        inputs: Σ (x - x̂) x̂ᵀ [I, I].
        residual: by the name of a site that writes to the residual stream Σ (r - r̂) x̂ᵀ [O, I], r being what its outputs are
            added to.
    """

    inputs: torch.Tensor
    residual: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ChangedTensor:
    """A tensor of the block that has been changed, and what it was."""

    tensor: torch.Tensor
    before: torch.Tensor
    now: torch.Tensor


def asymmetric_statistics(
    block: Block,
) -> Iterator[tuple[list[TargetLinear], InputStatistics, InputMismatch | None, bool]]:
    """Each group with H = Σ x̂ x̂ᵀ, its drift, and whether the block may be changed, which it is before the next is asked for.

    Takes two passes through the block as far as each group. Groups that do not read all tokens once each (experts) come last
    and have no drift; see `Block.statistics`.
    """
    once, writers = _explore(block)
    changed: list[ChangedTensor] = []
    for group in once:
        statistics, mismatch = measure(block, group, writers, changed)
        before = [linear.weight.clone() for linear in group]
        yield group, statistics, mismatch, True
        changed += [ChangedTensor(s.weight, w, s.weight.clone()) for s, w in zip(group, before, strict=True)]
    if rest := [group for group in block.groups if group not in once]:
        for group, statistics, free in block.statistics(groups=rest):
            yield group, statistics, None, free


def statistics_of(block: Block) -> Iterator[tuple[list[TargetLinear], InputStatistics, InputMismatch | None, bool]]:
    """As `asymmetric_statistics`, or where there is no original to compare with without drift."""
    return asymmetric_statistics(block) if block.originals is not None else symmetric_statistics(block)


def symmetric_statistics(
    block: Block,
) -> Iterator[tuple[list[TargetLinear], InputStatistics, InputMismatch | None, bool]]:
    """Each group with its statistics and no drift, see `Block.statistics`."""
    for group, statistics, free in block.statistics():
        yield group, statistics, None, free


def _explore(block: Block) -> tuple[list[list[TargetLinear]], list[TargetLinear]]:
    """Groups that read once in a pass, in their order; and the sites, one or two, whose outputs added to the block's input
    make its output, in order: none where no such are found.
    """
    linears = [linear for group in block.groups for linear in group if linear.owner is None]
    with torch.no_grad(), unfused(block.swaps), record_outputs(linears) as outputs:
        hidden = block.inputs.read([0]).to(block.runner.device)
        wanted = (block.forward([0], hidden) - hidden).float()
    order = list(outputs)
    once = [g for g in block.groups if all(s.owner is None and len(outputs.get(s.name, ())) == 1 for s in g)]
    once.sort(key=lambda group: order.index(group[0].name))
    alone = sorted(chain.from_iterable(once), key=lambda linear: order.index(linear.name))
    written = {s.name: outputs[s.name][0].float() for s in alone}
    fitting = [s for s in alone if written[s.name].numel() == wanted.numel()]
    bound = _UNEXPLAINED * float(wanted.abs().max())
    for writers in (list(w) for count in (1, 2) for w in combinations(fitting, count)):
        left = wanted - sum(written[s.name].view(wanted.shape) for s in writers)
        if float(left.abs().max()) <= bound:
            return once, writers
    return once, []


def measure(
    block: Block, group: list[TargetLinear], writers: Sequence[TargetLinear], changed: Sequence[ChangedTensor]
) -> tuple[InputStatistics, InputMismatch]:
    """Statistics and drift of a group, from passes through the block as it is and as it was before ``changed``.

    Args:
        writers: sites that write to the residual stream, in order.
    """
    runner = block.runner
    assert block.originals is not None
    width = group[0].weight.shape[1]

    def zeros(rows: int) -> torch.Tensor:
        return torch.zeros(rows, width, dtype=summing_dtype(width), device=runner.device)

    statistics = InputStatistics(zeros(width))
    mismatch = InputMismatch(zeros(width), {s.name: zeros(len(s.weight)) for s in group if s in writers})
    earlier = writers[: writers.index(group[0])] if group[0] in writers else []
    for rows in runner.batches():
        now, residual_now = _read(block, group[0], earlier, block.inputs, rows)
        with _restored(changed):
            then, residual_then = _read(block, group[0], earlier, block.originals, rows)
        statistics.add(now)
        mismatch.inputs += (then - now).T @ now
        for total in mismatch.residual.values():
            total += (residual_then - residual_now).T @ now
    statistics.finish()
    runner.processes.all_reduce(statistics.hessian, statistics.total, mismatch.inputs, *mismatch.residual.values())
    statistics.tokens = int(runner.processes.reduce_sum(statistics.tokens)[0])
    runner.shared_tensors.add(group, statistics)
    return statistics, mismatch


def _read(
    block: Block, linear: TargetLinear, earlier: Sequence[TargetLinear], inputs: Activations, rows: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of a site [T, I], and the block's input with what ``earlier`` sites add [T, hidden]; float32, without padding."""
    hidden = inputs.read(rows).to(block.runner.device)
    residual = hidden.float().reshape(-1, hidden.shape[-1])
    found: list[torch.Tensor] = []

    def stop(module: Any, args: tuple[Any, ...]) -> None:
        found.append(args[0].float())
        raise StopForward

    def add(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        nonlocal residual
        residual = residual + output.float().view(residual.shape)

    handles = [linear.module.register_forward_pre_hook(stop), *(s.module.register_forward_hook(add) for s in earlier)]
    try:
        with torch.no_grad(), unfused(block.swaps), suppress(StopForward):
            block.forward(rows, hidden)
    finally:
        for handle in handles:
            handle.remove()
    x = found[0].reshape(-1, found[0].shape[-1])
    if (mask := block.runner.mask(rows)) is not None:
        x, residual = x[mask.flatten()], residual[mask.flatten()]
    return x, residual


@contextmanager
def _restored(changed: Sequence[ChangedTensor]) -> Iterator[None]:
    """Within, the tensors are what they were."""
    try:
        for one in changed:
            one.tensor.copy_(one.before)
        yield
    finally:
        for one in changed:
            one.tensor.copy_(one.now)
