"""Block by block over a checkpoint, with calibration activations, in the memory of one block.

    embed ▶ for each block: load ▶ statistics of its inputs ▶ change ▶ rerun ▶ write ▶ drop

Two streams of activations go along: the outputs of the blocks as changed so far (the inputs of the next block), and, where a
change is reconstructed towards the original, the outputs of the original blocks. Both alternate between two files, so a kill
at any moment leaves the inputs of the block that was worked on. A run that is started again in the same folder goes on after
the last finished block and ends with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

from compress.blockwise.activations import Activations, BlockStreams
from compress.blockwise.block import Block
from compress.blockwise.calls import NOT_RUN
from compress.blockwise.details import BlockDetails
from compress.blockwise.executor import BlockExecutor
from compress.blockwise.input_squares import save_input_squares
from compress.blockwise.inputs import Inputs
from compress.blockwise.linears import find_linears, out_of_reach
from compress.blockwise.memory_budget import ALLOCATOR_RETAIN
from compress.blockwise.results import RunnerResult, TensorExtras, parts_of_tensors, write_block
from compress.blockwise.self_check import check_blockwise
from compress.blockwise.shared import SharedTensors
from compress.blockwise.targets import TargetStream, Teacher
from compress.checkpoint.values import Checkpoint
from compress.errors import PassError
from compress.memory import keep_freed
from compress.models.classes import quiet_transformers
from compress.progress import Progress
from compress.workspace import Workspace

#: Changes the weights in a block's module, and returns what some tensors have beside them, by name.
BlockFn = Callable[[Block], dict[str, TensorExtras]]


@dataclass
class RunnerState:
    """The block to work on next, and the report's row of each finished one. Saved when all activations are written."""

    next: int = 0
    details: list[BlockDetails] = field(default_factory=list)


class BlockRunner:
    """Changes the tensors ``wanted`` of a checkpoint, block by block. See `run`.

    Args:
        inputs: calibration samples. workspace: for activations, results and the state to resume from.
        with_targets: also carry the original's hidden states along, for `reconstruct_block` and asymmetric calibration.
        teacher: the original, where it is not ``checkpoint``.
        leave: tensors that stay as they are where an inferred record describes the model and they are no linear layers of
            its class; ``left`` names them, so that the pass treats them by their weights alone.
        max_vram: bytes of a GPU's memory; see `compress.blockwise.device_room`.

    Raises:
        PassError: a wanted tensor is outside the blocks, or shared with a block that comes before it is solved.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        inputs: Inputs,
        wanted: set[str],
        *,
        workspace: Workspace,
        dtype: str,
        device: str,
        progress: Progress,
        with_targets: bool,
        seed: int = 0,
        teacher: Teacher | None = None,
        leave: Collection[str] = (),
        max_vram: int | None = None,
    ) -> None:
        self.checkpoint, self.inputs, self.wanted = checkpoint, inputs, wanted
        self.workspace, self.progress = workspace, progress
        self.executor = BlockExecutor(
            checkpoint, inputs, dtype=dtype, device=device, seed=seed, processes=workspace.processes, max_vram=max_vram
        )
        self.streamed, self.processes = self.executor.streamed, self.executor.processes
        self.streamed.map_tables(workspace.path)
        self._targets = TargetStream(self.executor, teacher, workspace.path) if with_targets else None
        self._by_block: dict[int, set[str]] = {}
        outside: set[str] = set()
        inferred = self.streamed.record.source != "written"
        for name in sorted(wanted):
            index = self.streamed.number_of(name)
            if index is None and inferred and name in leave:
                outside.add(name)
                continue
            if index is None:
                raise PassError(
                    f"{name} is outside the blocks, where calibrated methods do not reach",
                    key="only",
                    fix="use method: magnitude for it",
                )
            self._by_block.setdefault(index, set()).add(name)
        self.left = self._leave(leave, outside) if leave else frozenset()
        self._shared = SharedTensors(self.executor, self.wanted, workspace)

    def _leave(self, names: Collection[str], outside: Collection[str]) -> frozenset[str]:
        """Take out of ``wanted`` what calibration does not reach; nothing where that would be all.

        Args:
            outside: what is in no block, such as layers between stages.
        """
        if self.streamed.record.source == "written":
            return frozenset()
        left = (frozenset(out_of_reach(self.streamed, self._by_block)) & frozenset(names)) | frozenset(outside)
        if not left or left == self.wanted:
            return frozenset()
        self.wanted = self.wanted - left
        self._by_block = {i: rest for i, own in self._by_block.items() if (rest := own - left)}
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        self.progress.message(
            f"{min(left)}{more}: no linear layer that calibrated methods reach, treated by the weights alone"
        )
        return left

    def run(
        self, change: BlockFn, title: str, before: Callable[[], None] | None = None, *, late_targets: bool = False
    ) -> RunnerResult:
        """Change every block in order, up to the last one with a wanted tensor.

        Args:
            change: alters weights in the block's module, and returns masks, codes and factors by tensor.
            title: of the progress bar. before: called once it is known how blocks are called; a resumed run calls it again.
            late_targets: the change gathers asymmetric statistics of every block, which write the original's outputs too.

        Raises:
            PassError: the model cannot be run block by block. CheckpointError: a block outputs NaN or infinite values.
        """
        keep_freed(ALLOCATOR_RETAIN)
        saved = self.workspace.read_json("state")
        state = None if saved is None else RunnerState(**saved)
        if state is None:
            check_blockwise(self.executor, self.progress, self._by_block)
        else:
            self.executor.learn_calls()
        if self._targets is not None:
            self._targets.learn_calls()
        if before is not None:
            before()
        self._shared.collect(self.progress)
        stream = self.executor.open_stream(self.workspace.path, "inputs")
        if self._targets is not None:
            self._targets.open()
        if state is None:
            state = RunnerState()
        begin, last = state.next, max(self._by_block)
        self.processes.barrier()
        with self.progress.task(title, last + 1, "blocks") as task:
            task.advance(state.next)
            for index in range(state.next, last + 1):
                start = time.perf_counter()
                if index == begin or self.executor.is_first(index):
                    self._enter(index, stream)
                with quiet_transformers(), self.streamed.block(index) as module:
                    details = self._block(index, module, stream, change, last, late_targets)
                self.executor.room.learn()
                details["seconds"] = round(time.perf_counter() - start, 3)
                state.details.append(cast("BlockDetails", {"block": index, **details}))
                state.next = index + 1
                self.workspace.write_json("state", asdict(state))
                task.advance(note=f"block {index}")
        stream.close()
        while self.executor.spare:
            self.executor.spare.pop().close()
        if self._targets is not None:
            self._targets.close()
        return RunnerResult(self.workspace.folder("blocks").path, self.checkpoint, list(range(last + 1)), state.details)

    def _enter(self, index: int, stream: BlockStreams) -> None:
        """Make ready for the block to go on with, or the first of a list."""
        self.executor.enter(index, stream)
        if self._targets is not None:
            self._targets.enter(index)

    def _block(
        self, index: int, module: Any, stream: BlockStreams, change: BlockFn, last: int, late_targets: bool
    ) -> dict[str, Any]:
        """Change one loaded block, write its tensors and its outputs; the report's row of it."""
        linears, swaps = find_linears(self.streamed, index, module, self._by_block.get(index, ()))
        block = Block(self.executor, index, module, linears, swaps, stream.before(index))
        block.add_shared_inputs = self._shared.add
        block.runs = not self.executor.calls.is_left_out(index)
        if self._targets is not None:
            block.originals, block.targets = self._targets.states(index)
            block.original_view = self._targets.view
            block.write_targets = partial(self._targets.write, index, module)
            if not (late_targets and linears and block.runs and self._targets.view is not None):
                block.finish_targets()
        self._shared.renew(block)
        if linears:
            self._change(block, change)
        assert block.write_targets is None
        if index < last:
            self._outputs(block, stream.after(index))
        return block.details

    def _outputs(self, block: Block, target: Activations) -> None:
        """Write the changed block's outputs; where its samples are on their way already, they go on from there."""
        if block.last_part is not None and block.last_part.holds():
            outputs = block.last_part.outputs()
        else:
            outputs = self.executor.outputs(block.index, block.module, block.inputs)
        for rows, output in outputs:
            self.executor.check_finite(block.index, output)
            target.write(rows, output)
        target.sync()

    def _change(self, block: Block, change: BlockFn) -> None:
        block.frozen = self._shared.frozen(block) | self._handed_on(block)
        if self.streamed.record.source != "written":
            block.frozen |= parts_of_tensors(self.checkpoint, self.streamed, block.index, block.module)
        block.find_groups()
        if (split := self._shared.split(block.groups)) != block.groups:
            block.groups, block.last = split, None
        self._write(block, change(block))
        save_input_squares(self.workspace, block.index, block.input_squares)
        if (experts := block.experts()) is not None:
            block.details["experts"] = experts
        if not block.runs:
            title = self.streamed.title_of(block.index)
            self.progress.message(f"{title} {NOT_RUN}: its matrices are treated by their weights alone")
        elif block.unread:
            self.progress.message(f"no calibration token reaches {block.unread[0]}: it is treated by its weights alone")

    def _handed_on(self, block: Block) -> set[int]:
        """Ids of the parameters of a block that later blocks read the results of, which stay as they are."""
        names = self.executor.calls.handed_on(block.index)
        return {id(p) for name, p in block.module.named_parameters() if name in names}

    def _write(self, block: Block, extras: Mapping[str, TensorExtras]) -> None:
        blocks = self.workspace.folder("blocks")
        write_block(blocks, self.checkpoint, self.streamed, block.index, block.module, extras)
