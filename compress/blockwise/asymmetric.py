"""Statistics of a block's groups in the order in which they read, with how earlier changes moved their inputs.

Each group is changed before the next is measured (GPTQ's "true sequential"), so later ones see the errors of earlier ones.
Asymmetric calibration (GPTAQ, arXiv 2504.02692) also compares with the original, so that they can compensate for them.
I inputs and O outputs of a matrix, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import NamedTuple

import torch

from compress.blockwise.activations import Activations
from compress.blockwise.block import Block
from compress.blockwise.experts import unfused
from compress.blockwise.hessians import InputStatistics, counted, empty_statistics, hessian_dtype, tensor_cores
from compress.blockwise.linears import TargetLinear, record_outputs
from compress.blockwise.passage import Passage
from compress.blockwise.spilled import SpilledValues

#: Largest part of a block's output less its input that the matrices that write to the residual stream may leave unexplained.
_UNEXPLAINED = 1e-4


@dataclass
class InputMismatch:
    """Sums over tokens; x and r belong to the original, x̂ and r̂ to the model as it is now.

    Attributes:
        inputs: Σ (x - x̂) x̂ᵀ [I, I].
        residual: Σ (r - r̂) x̂ᵀ [O, I] by the name of each linear that writes to the residual stream; its outputs are added
            to r.
        readers: number of linears that are still to read them; 0 keeps the sums.
    """

    inputs: torch.Tensor
    residual: dict[str, torch.Tensor] = field(default_factory=dict)
    readers: int = 0

    def release(self) -> None:
        """One linear of ``readers`` has read the sums; they are freed after the last one."""
        self.readers -= 1
        if self.readers == 0:
            self.inputs = self.inputs.new_empty(0)
            self.residual = {}


class Measured(NamedTuple):
    """A group with what was measured of its inputs.

    Attributes:
        linears: the group. statistics: its H = Σ x̂ x̂ᵀ. mismatch: None without targets.
        free: whether the block may be changed now.
        waiting: number of groups that come next without another pass through the block, whatever becomes of this one.
    """

    linears: list[TargetLinear]
    statistics: InputStatistics
    mismatch: InputMismatch | None
    free: bool
    waiting: int = 0


def statistics_of(block: Block, *, tuned: bool = False) -> Iterator[Measured]:
    """`asymmetric_statistics` in a run with targets, else `symmetric_statistics`."""
    return (asymmetric_statistics if block.originals is not None else symmetric_statistics)(block, tuned=tuned)


def symmetric_statistics(block: Block, *, tuned: bool = False) -> Iterator[Measured]:
    """Yield each group with its statistics, and None for its mismatch.

    The caller changes the group's matrices before it asks for the next group. The samples go through the block once. Groups
    that no tape comes to (experts, and what reads behind them) come last and take another pass; see `Block.statistics`.

    Args:
        tuned: the block is tuned afterwards. Otherwise weights are rounded to their stored dtype as soon as they are changed,
            and the runner takes the block's outputs from the same pass.
    """
    passage = Passage(block, block.groups_once(), {})
    once = block.groups_once()[: block.view.processes.broadcast_object(0, passage.reach())]
    for number, group in enumerate(once):
        statistics = empty_statistics(group, block.view.device)
        for rows, (x,) in passage.advance(number):
            statistics.add(counted(group[0].rows(x), block.token_masks(rows)))
        statistics.finish()
        block.sum_over_processes(statistics)
        block.record(group, statistics)
        block.add_shared_inputs(group, statistics)
        yield Measured(group, statistics, None, True)
        if not tuned:
            block.round(group)
    yield from _end(block, once, passage, tuned)


def asymmetric_statistics(block: Block, *, tuned: bool = False) -> Iterator[Measured]:
    """The same with each group's mismatch, in a run with targets.

    The original's samples go through the block once as well. Where the block's targets are not written yet, they are then.
    """
    once, writers = block.groups_once(), _writers(block)
    shown = {number: writers[: writers.index(g[0])] for number, g in enumerate(once) if g[0] in writers}
    now = Passage(block, once, shown)
    then = Passage(block, once, shown, inputs=block.originals, original=True, tapes=now.tapes)
    changed: list[SpilledValues] = []
    differing: list[list[TargetLinear]] = []
    for number, group in enumerate(once):
        with _restored(changed):
            then.bring(number)
        measured = _measured(block, group, shown.get(number), (now, then, number), changed)
        if measured is None:
            differing.append(group)
            continue
        statistics, mismatch = measured
        del measured
        block.record(group, statistics)
        before = SpilledValues(block.inputs.path.parent, [linear.weight for linear in group])
        yield Measured(group, statistics, mismatch, True)
        if not tuned:
            block.round(group)
        del statistics, mismatch
        changed.append(before)
    if block.write_targets is None:
        then.close()
    elif once:
        with _restored(changed):
            block.finish_targets(then.outputs())
    else:
        block.finish_targets()
    for before in changed:
        before.close()
    yield from _end(block, [group for group in once if group not in differing], now, tuned)


def mismatch_of(
    block: Block, group: list[TargetLinear], changed: Sequence[SpilledValues]
) -> tuple[InputStatistics, InputMismatch] | None:
    """Statistics of a group, and how ``changed`` has moved its inputs, on the block's own inputs; see `_measured`."""
    now, then = (Passage(block, [group], {}, taped=False) for _ in range(2))
    measured = _measured(replace(block, originals=block.inputs), group, None, (now, then, 0), changed)
    now.close()
    then.close()
    return measured


def _end(block: Block, once: list[list[TargetLinear]], passage: Passage, tuned: bool) -> Iterator[Measured]:
    """The groups that are left. Where none are, the runner can go on with the passage."""
    rest = _by_shapes([group for group in block.groups if group not in once])
    if rest or tuned:
        passage.close()
    else:
        passage.seal()
        block.last_part = passage
    if rest:
        for group, statistics, free, waiting in block.statistics_in_parts(groups=rest):
            yield Measured(group, statistics, None, free, waiting)


def _by_shapes(groups: Sequence[list[TargetLinear]]) -> list[list[TargetLinear]]:
    """The groups with those of the same shapes behind one another, as `solve_block` takes experts together."""
    shapes = [tuple(linear.weight.shape for linear in group) for group in groups]
    places = {shape: place for place, shape in enumerate(dict.fromkeys(shapes))}
    order = sorted(range(len(groups)), key=lambda i: places[shapes[i]])
    return [groups[i] for i in order]


def _writers(block: Block) -> list[TargetLinear]:
    """The linears that write to the residual stream, in the order of reading.

    They are the one or two linears whose outputs added to the block's input make its output; none where there are no such.
    """
    linears = {linear.name: linear for group in block.groups for linear in group}
    singles = [linears[name] for name in block.once]
    with torch.no_grad(), unfused(block.swaps), record_outputs(singles) as outputs:
        hidden = block.read_inputs([0])
        output = block.forward([0], hidden)
    if output.shape != hidden.shape:
        return []
    wanted = (output - hidden).float()
    written = {s.name: outputs[s.name][0].float() for s in singles}
    fitting = [s for s in singles if not s.kernel and written[s.name].numel() == wanted.numel()]
    bound = _UNEXPLAINED * float(wanted.abs().max())
    for writers in (list(w) for count in (1, 2) for w in combinations(fitting, count)):
        left = wanted - sum(written[s.name].view(wanted.shape) for s in writers)
        if float(left.abs().max()) <= bound:
            return writers
    return []


def _measured(
    block: Block,
    group: list[TargetLinear],
    earlier: Sequence[TargetLinear] | None,
    stop: tuple[Passage, Passage, int],
    changed: Sequence[SpilledValues],
) -> tuple[InputStatistics, InputMismatch] | None:
    """Statistics and mismatch of a group; None where the two read other numbers of tokens, as experts that a router chooses.

    Args:
        earlier: linears that write to the residual stream before the group does; None where it does not.
        stop: samples on their way through the block as it is and through the original, which has come to that stop.
        changed: what differs between the two.
    """
    assert block.originals is not None
    now, then, number = stop
    width = group[0].weight.shape[1]

    def zeros(rows: int) -> torch.Tensor:
        return torch.zeros(rows, width, dtype=hessian_dtype(width), device=block.view.device)

    statistics = InputStatistics(zeros(width))
    mismatch = InputMismatch(
        zeros(width), {s.name: zeros(len(s.weight)) for s in group if earlier is not None}, len(group)
    )
    differing = 0
    for batch, (rows, (x_now, *outputs)) in enumerate(now.advance(number)):
        with _restored(changed) if then.starts_anew(number, batch) else nullcontext():
            x_then, *outputs_then = then.waiting(number, batch)
        masks = block.token_masks(rows)
        x_now, x_then = (counted(group[0].rows(x.float()), masks) for x in (x_now, x_then))
        residual = None
        if earlier is not None:
            residual = counted(_residual(block, block.inputs, rows, earlier, outputs), masks)
        if len(x_then) != len(x_now) or (residual is not None and len(residual) != len(x_now)):
            differing += 1
            continue
        statistics.add(x_now)
        with tensor_cores(x_now, tiles=True):
            mismatch.inputs += (x_then - x_now).T @ x_now
        if residual is not None and earlier is not None:
            residual_then = counted(_residual(block, block.originals, rows, earlier, outputs_then), masks)
            with tensor_cores(x_now, tiles=True):
                for total in mismatch.residual.values():
                    total += (residual_then - residual).T @ x_now
    if block.view.processes.reduce_sum(differing)[0]:
        return None
    statistics.finish()
    block.sum_over_processes(statistics, mismatch.inputs, *mismatch.residual.values())
    block.add_shared_inputs(group, statistics)
    return statistics, mismatch


def _residual(
    block: Block,
    inputs: Activations,
    rows: Sequence[int],
    earlier: Sequence[TargetLinear],
    outputs: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The residual stream [T, hidden] behind earlier linears with those outputs, float32."""
    hidden = inputs.read(rows).to(block.view.device)
    residual = hidden.float().reshape(-1, hidden.shape[-1])
    for linear, output in zip(earlier, outputs, strict=True):
        residual = residual + linear.rows(output.float())
    return residual


@contextmanager
def _restored(changed: Sequence[SpilledValues]) -> Iterator[None]:
    """Within, the tensors have their values before the change."""
    for one in changed:
        one.swap()
    try:
        yield
    finally:
        for one in changed:
            one.swap()
