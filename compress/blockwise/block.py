"""One loaded block as a pass sees it: its target linears, their inputs, and the statistics of those inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import torch

from compress.blockwise.activations import Activations, HiddenStates
from compress.blockwise.arguments import Call
from compress.blockwise.device_room import DeviceRoom
from compress.blockwise.experts import ExpertSwap, unfused
from compress.blockwise.hessians import (
    InputStatistics,
    collect_hessians,
    hessian_bytes,
    set_token_masks,
)
from compress.blockwise.linears import TargetLinear, group_linears
from compress.blockwise.memory_budget import STATISTICS_BYTES
from compress.blockwise.predictions import Predict
from compress.blockwise.routed import marked, routing_lists
from compress.blockwise.streamed import StopForward
from compress.distributed import ProcessGroup


class BlockView(Protocol):
    """The run around a block, as far as work on the block needs it.

    Attributes:
        device: where blocks are. seed: of random draws. processes: the processes that work on the same blocks.
        samples: number of calibration samples. tokens: number of tokens in them that count.
        proven: tapes of blocks that computed what the blocks did, as text. spare: files without a name, to use again.
        room: in the device's memory, for hidden states.
    """

    device: str
    seed: int
    processes: ProcessGroup
    samples: int
    tokens: int
    proven: set[str]
    spare: list[IO[bytes]]
    room: DeviceRoom

    def arguments(self, index: int, rows: Sequence[int]) -> Call:
        """Arguments of a block beside hidden states, for those samples."""
        ...

    def run(self, index: int, module: Any, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Outputs of a loaded block for hidden states with their samples first, and other arguments."""
        ...

    def forward(self, index: int, module: Any, rows: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
        """Outputs of a loaded block for those samples and hidden states [len(rows), …]."""
        ...

    def predictions(self, index: int) -> AbstractContextManager[Predict | None]:
        """Within, logits for hidden states behind a block; None where others than these decide them."""
        ...

    def batches(self, first: int | None = None) -> Iterator[list[int]]:
        """Numbers of this process's samples, a batch at a time; with ``first``, of only so many of all samples."""
        ...

    def token_mask(self, rows: Sequence[int], index: int = 0) -> torch.Tensor | None:
        """Which tokens of those samples count in front of a block, bool [len(rows), length]; None for all."""
        ...

    def token_masks(self, rows: Sequence[int], index: int) -> tuple[torch.Tensor, ...]:
        """Which tokens of those samples count: in front of a block, then those of other lists; empty where all count."""
        ...

    def keep_mask(self, name: str) -> torch.Tensor | None:
        """The keep-mask that a tensor has in the checkpoint, shaped as there; None where it has none."""
        ...

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor has in the checkpoint."""
        ...


class LastPart(Protocol):
    """Samples that have come as far as a block's last group."""

    def holds(self) -> bool:
        """Whether the block's weights are still those that the samples met on their way."""
        ...

    def outputs(self) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield numbers of samples and the block's outputs for them; once."""
        ...


def _no_shared_inputs(group: Sequence[TargetLinear], statistics: InputStatistics) -> None:
    """Nothing to add: no other block reads with these tensors."""


@dataclass
class Block:
    """A loaded block at work.

    Attributes:
        view: the run around it. index: the block's number. module: with weights. linears: its target linears.
        groups: the linears that read the same inputs. swaps: fused experts to run one by one.
        inputs: hidden states that the changed blocks before it output.
        originals: hidden states that the original blocks before it output; targets: what the original block makes of those.
            Both None in a run without targets. original_view: the run around the original, where that is another one.
        write_targets: writes the targets, from the original block's outputs if these are known; None once they are written.
        once: names of linears that read every token once, in the order of reading.
        last: the group that reads last in a pass, if it is always the same.
        last_part: what is left of a pass in which the groups were changed one after another.
        details: rows for the report.
        frozen: ids of parameters that other blocks share; they are solved for and then stay.
        runs: whether the model runs the block on the calibration data; one that it leaves out hands on its inputs.
        reached: number of tokens that each expert read, by the expert's name in the checkpoint, where it was counted.
        unread: names of tensors outside of experts that no token reached.
        input_squares: mean squares of inputs, float32 [I], and the number of tokens, by the tensors that were measured.
        add_shared_inputs: adds to a group's statistics the inputs of other blocks that share its tensors.
    """

    view: BlockView
    index: int
    module: Any
    linears: list[TargetLinear]
    swaps: list[ExpertSwap]
    inputs: Activations
    originals: Activations | None = None
    targets: HiddenStates | None = None
    original_view: BlockView | None = None
    write_targets: Callable[[Iterator[tuple[list[int], torch.Tensor]] | None], None] | None = None
    groups: list[list[TargetLinear]] = field(default_factory=list)
    once: list[str] = field(default_factory=list)
    last: int | None = None
    last_part: LastPart | None = None
    details: dict[str, Any] = field(default_factory=dict)
    frozen: set[int] = field(default_factory=set)
    runs: bool = True
    reached: dict[str, int] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    input_squares: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)
    add_shared_inputs: Callable[[list[TargetLinear], InputStatistics], None] = _no_shared_inputs

    def forward(self, rows: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
        """Outputs of the block as it is now, for those samples and hidden states [len(rows), …]."""
        return self.view.forward(self.index, self.module, rows, hidden)

    def forward_original(self, rows: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
        """The same for hidden states of the original, whose encoder may have ended in others."""
        return (self.original_view or self.view).forward(self.index, self.module, rows, hidden)

    def finish_targets(self, outputs: Iterator[tuple[list[int], torch.Tensor]] | None = None) -> None:
        """Write the targets if they are not; without the original's outputs the block must be as it came."""
        if self.write_targets is not None:
            self.write_targets(outputs)
            self.write_targets = None

    def token_mask(self, rows: Sequence[int]) -> torch.Tensor | None:
        """Which tokens of those samples count in front of the block, bool [len(rows), length]; None for all."""
        return self.view.token_mask(rows, self.index)

    def token_masks(self, rows: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """The same mask, then those of other lists of blocks, whose lengths differ; empty where all tokens count."""
        return self.view.token_masks(rows, self.index)

    def read_inputs(self, rows: Sequence[int]) -> torch.Tensor:
        """Hidden states in front of the block, of those samples, on the block's device."""
        return self.inputs.read(rows).to(self.view.device)

    def find_groups(self) -> None:
        """Set ``groups``, ``once`` and ``last`` by running one sample."""
        rows = [0]
        with torch.no_grad(), unfused(self.swaps):
            self.groups, self.once = group_linears(self.linears, lambda: self.forward(rows, self.read_inputs(rows)))
        if len(self.once) == len(self.linears):
            self.last = max(range(len(self.groups)), key=lambda g: self.once.index(self.groups[g][0].name))

    def groups_once(self) -> list[list[TargetLinear]]:
        """The groups that read every token once, in the order of reading."""
        groups = [group for group in self.groups if all(linear.name in self.once for linear in group)]
        return sorted(groups, key=lambda group: self.once.index(group[0].name))

    def round(self, group: Sequence[TargetLinear]) -> None:
        """Round weights to the dtypes that they are stored in."""
        for linear in group:
            linear.weight.copy_(linear.weight.to(self.view.stored_dtype(linear.tensor)))

    def earlier_mask(self, linear: TargetLinear) -> torch.Tensor | None:
        """The keep-mask that a linear's tensor has in the checkpoint, bool [O, I]; None where it has none."""
        mask = self.view.keep_mask(linear.tensor)
        return None if mask is None else linear.own(mask).to(linear.weight.device)

    def groups_with(self, names: Collection[str]) -> list[list[TargetLinear]]:
        """The groups that hold one of these tensors."""
        return [group for group in self.groups if any(linear.name in names for linear in group)]

    def statistics(
        self, budget: int = STATISTICS_BYTES, groups: Sequence[list[TargetLinear]] | None = None
    ) -> Iterator[tuple[list[TargetLinear], InputStatistics, bool]]:
        """Yield each group, its H = Σ x xᵀ, and whether the block may be changed now: no further pass through it follows.

        As many groups at a time as fit ``budget`` bytes, at least one; each such part takes one pass over the samples.

        Args:
            groups: those to measure; all by default.
        """
        for group, statistics, free, _ in self.statistics_in_parts(budget, groups):
            yield group, statistics, free

    def statistics_in_parts(
        self, budget: int = STATISTICS_BYTES, groups: Sequence[list[TargetLinear]] | None = None
    ) -> Iterator[tuple[list[TargetLinear], InputStatistics, bool, int]]:
        """The same with the number of groups that come next without another pass."""
        pending = list(self.groups if groups is None else groups)
        while pending:
            part = [pending.pop(0)]
            used = hessian_bytes(part[0])
            while pending and used + hessian_bytes(pending[0]) <= budget:
                part.append(pending.pop(0))
                used += hessian_bytes(part[-1])
            measured = self._measure(part)
            for group in part:
                statistics = measured.pop(0)
                self.sum_over_processes(statistics)
                self.record(group, statistics)
                self.add_shared_inputs(group, statistics)
                yield group, statistics, not pending, len(measured)

    def _measure(self, groups: Sequence[list[TargetLinear]]) -> list[InputStatistics]:
        """Statistics of groups from one pass over this process's samples."""
        end = None if self.last is None else self.groups[self.last]
        last = next((i for i, group in enumerate(groups) if group is end), None)
        routing = list(routing_lists(self.module).values())
        with torch.no_grad(), unfused(self.swaps), collect_hessians(groups, self.view.device, last) as measured:
            for rows in self.view.batches():
                masks = self.token_masks(rows)
                set_token_masks(groups, self.swaps, masks)
                with suppress(StopForward), marked(routing, masks):
                    self.forward(rows, self.read_inputs(rows))
            set_token_masks(groups, self.swaps, ())
        return measured

    def sum_over_processes(self, statistics: InputStatistics, *tensors: torch.Tensor) -> None:
        """Replace statistics, and further sums, by their totals over all processes."""
        self.view.processes.all_reduce(statistics.hessian, statistics.total, *tensors)
        statistics.tokens = int(self.view.processes.reduce_sum(statistics.tokens)[0])

    def record(self, group: Sequence[TargetLinear], statistics: InputStatistics) -> None:
        """Record how many tokens reached a group, and the mean squares of its inputs."""
        self.count(group, statistics.tokens)
        means = (statistics.hessian.diagonal() / max(statistics.tokens, 1)).float().cpu()
        self.input_squares |= {linear.name: (means, statistics.tokens) for linear in group}

    def count(self, linears: Sequence[TargetLinear], tokens: int) -> None:
        """Record that so many tokens reached the experts that these linears belong to."""
        self.unread += [linear.name for linear in linears if linear.owner is None and not tokens]
        names = {linear.name.rpartition(".")[0].rpartition(".")[0] for linear in linears if linear.owner is not None}
        self.reached |= dict.fromkeys(names, tokens)

    def experts(self) -> dict[str, Any] | None:
        """For the report, tokens in all and by expert; None where no expert was counted."""
        if not self.reached:
            return None
        order = sorted(self.reached, key=lambda name: (len(name), name))  # 2 before 10
        return {"tokens": self.view.tokens, "reached": {name: self.reached[name] for name in order}}
