"""Statistics of a block's groups in the order in which they read, with how earlier changes moved their inputs.

Each group is changed before the next is measured (GPTQ's "true sequential"), so later ones see the errors of earlier ones.
Asymmetric calibration (GPTAQ, arXiv 2504.02692) also compares with the original, so that they can compensate for them.
I inputs and O outputs of a matrix, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import torch

from compress.blockwise.activations import Activations
from compress.blockwise.block import Block
from compress.blockwise.correction import HeldOutTokens, InputMismatch, choose, held_out, tokens_of_each
from compress.blockwise.experts import unfused
from compress.blockwise.hessians import InputStatistics, counted, empty_statistics, hessian_dtype, tensor_cores
from compress.blockwise.linears import TargetLinear, record_outputs
from compress.blockwise.passage import Passage
from compress.blockwise.spilled import SpilledValues

#: Largest part of a block's output less its input that the matrices that write to the residual stream may leave unexplained.
_UNEXPLAINED = 1e-4


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
    measured = _measured(replace(block, originals=block.inputs), group, None, (now, then, 0), changed, hold=False)
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
    *,
    hold: bool = True,
) -> tuple[InputStatistics, InputMismatch] | None:
    """Statistics and mismatch of a group; None where the two read other numbers of tokens, as experts that a router chooses.

    Args:
        earlier: linears that write to the residual stream before the group does; None where it does not.
        stop: samples on their way through the block as it is and through the original, which has come to that stop.
        changed: what differs between the two.
        hold: leave some samples out of the mismatch, which say how far to follow it.
    """
    width = group[0].weight.shape[1]

    def zeros(rows: int) -> torch.Tensor:
        return torch.zeros(rows, width, dtype=hessian_dtype(width), device=block.view.device)

    statistics, held = InputStatistics(zeros(width)), HeldOutTokens()
    writers = {linear.name: zeros(len(linear.weight)) for linear in group if earlier is not None}
    mismatch = InputMismatch(zeros(width), writers, len(group))
    left_out = held_out(block.view.samples) if hold else set()
    most, fitted, differing = tokens_of_each(block.view.samples, width), 0, 0
    for tokens in _token_pairs(block, group, earlier, stop, changed):
        if tokens is None:
            differing += 1
            continue
        statistics.add(tokens.now)
        if tokens.samples is not None and left_out.intersection(tokens.rows):
            for row in left_out.intersection(tokens.rows):
                held.add(*tokens.some((tokens.samples == row).nonzero()[:most, 0]), writers)
            fit = torch.tensor([row not in left_out for row in tokens.samples.tolist()], device=tokens.now.device)
            now, moved, lacking = tokens.some(fit)
        else:
            now, moved, lacking = tokens.some(slice(None))
        fitted += len(now)
        with tensor_cores(now, tiles=True):
            mismatch.inputs += moved.T @ now
            if lacking is not None:
                for total in mismatch.residual.values():
                    total += lacking.T @ now
    if block.view.processes.reduce_sum(differing)[0]:
        return None
    statistics.finish()
    block.sum_over_processes(statistics, mismatch.inputs, *mismatch.residual.values())
    mismatch.scale = statistics.tokens / max(block.view.processes.reduce_sum(fitted)[0], 1)
    if hold:
        choose(group, statistics.hessian, mismatch, held, block.view.processes)
    block.add_shared_inputs(group, statistics)
    return statistics, mismatch


@dataclass(frozen=True)
class _Tokens:
    """Tokens of some samples in front of a group.

    Attributes:
        rows: numbers of the samples. samples: that of each token [T]; None where it is not known.
        now: x̂ [T, I]. moved: x - x̂ [T, I]. lacking: r - r̂ [T, O] where the group writes to the residual stream.
    """

    rows: list[int]
    samples: torch.Tensor | None
    now: torch.Tensor
    moved: torch.Tensor
    lacking: torch.Tensor | None

    def some(self, which: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """``now``, ``moved`` and ``lacking`` of some tokens."""
        return self.now[which], self.moved[which], None if self.lacking is None else self.lacking[which]


def _token_pairs(
    block: Block,
    group: list[TargetLinear],
    earlier: Sequence[TargetLinear] | None,
    stop: tuple[Passage, Passage, int],
    changed: Sequence[SpilledValues],
) -> Iterator[_Tokens | None]:
    """The tokens that count, batch by batch; None where the two read other numbers. Arguments are those of `_measured`.

    In front of linears that write to the residual stream each token is divided by the size of that stream behind them.
    """
    assert block.originals is not None
    now, then, number = stop
    for batch, (rows, (x_now, *outputs)) in enumerate(now.advance(number)):
        with _restored(changed) if then.starts_anew(number, batch) else nullcontext():
            x_then, *outputs_then = then.waiting(number, batch)
        masks = block.token_masks(rows)
        samples = _samples_of_tokens(group[0].rows(x_now), rows, masks)
        x_now, x_then = (counted(group[0].rows(x.float()), masks) for x in (x_now, x_then))
        if earlier is None:
            yield _Tokens(rows, samples, x_now, x_then - x_now, None) if len(x_then) == len(x_now) else None
            continue
        stream = counted(_residual(block, block.inputs, rows, earlier, outputs), masks)
        if len(x_then) != len(x_now) or len(stream) != len(x_now):
            yield None
            continue
        original = counted(_residual(block, block.originals, rows, earlier, outputs_then), masks)
        weight = _weights(original, x_then, group)
        yield _Tokens(rows, samples, x_now * weight, (x_then - x_now) * weight, (original - stream) * weight)


def _weights(stream: torch.Tensor, x: torch.Tensor, writers: Sequence[TargetLinear]) -> torch.Tensor:
    """One over the root mean square of each token's residual stream behind the writers, [T, 1].

    The norm in front of what reads it divides by that.
    """
    for linear in writers:
        stream = stream + x @ linear.weight.float().T
    return stream.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()


def _samples_of_tokens(x: torch.Tensor, rows: Sequence[int], masks: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The sample of each token of x [T, …] that counts, of those samples; None where they have not as many tokens each."""
    each, rest = divmod(len(x), len(rows))
    return None if rest else counted(torch.tensor(rows, device=x.device).repeat_interleave(each), masks)


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
