"""The original's hidden states, which blocks are reconstructed towards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from compress.blockwise.activations import Activations, BlockStreams, HiddenStates
from compress.blockwise.executor import BlockExecutor
from compress.checkpoint.values import Checkpoint

#: Numbers of samples and a block's outputs for them, a batch at a time.
Outputs: TypeAlias = Iterator[tuple[list[int], torch.Tensor]]


@dataclass(frozen=True)
class Teacher:
    """The original that blocks are reconstructed towards, where it is not the checkpoint being changed.

    Attributes:
        checkpoint: the original. spans: block i of the changed checkpoint stands for the original's blocks from
            ``spans[i - 1]`` (0 for the first) up to ``spans[i]``.
        channels: the original's hidden channels that the changed checkpoint has; None for all.
    """

    checkpoint: Checkpoint
    spans: Sequence[int]
    channels: torch.Tensor | None = None

    def blocks(self, index: int) -> range:
        """Numbers of the original's blocks that block ``index`` stands for."""
        return range(self.spans[index - 1] if index else 0, self.spans[index])


@dataclass(frozen=True)
class SelectedChannels:
    """Some channels of hidden states."""

    states: HiddenStates
    channels: torch.Tensor

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        """The channels of the samples' hidden states, [len(rows), …, channels]."""
        return self.states.read(rows)[..., self.channels]


class TargetStream:
    """Hidden states of the original in front of each of the runner's blocks, one block at a time.

    Args:
        executor: of the checkpoint being changed; its blocks are the original's until they change, where there is no teacher.
    """

    def __init__(self, executor: BlockExecutor, teacher: Teacher | None, work: Path) -> None:
        self._teacher, self._work, self._executor = teacher, work, executor
        self._original = executor.beside()
        if teacher is not None:
            self._original = BlockExecutor(
                teacher.checkpoint,
                executor.inputs,
                dtype=str(executor.dtype).removeprefix("torch."),
                device=executor.device,
                seed=executor.seed,
                processes=executor.processes,
            )
            self._original.streamed.map_tables(work)
            self._original.room = executor.room

    def learn_calls(self) -> None:
        """Learn how the original's blocks are called; those of the executor must be known."""
        if self._teacher is None:
            self._original = self._executor.beside()
        else:
            self._original.learn_calls()

    @property
    def view(self) -> BlockExecutor | None:
        """The run around the original where it has the executor's blocks; None with a teacher of its own."""
        return self._original if self._teacher is None else None

    def open(self) -> None:
        """Open the files."""
        self._stream: BlockStreams = self._original.open_stream(self._work, "targets")

    def enter(self, index: int) -> None:
        """Make ready for block ``index``, the first of a list or the one to go on with; see `BlockExecutor.enter`."""
        self._original.enter(index if self._teacher is None else self._teacher.blocks(index).start, self._stream)

    def states(self, index: int) -> tuple[Activations, HiddenStates]:
        """The original's hidden states in front of a block, and those behind it, which `write` writes.

        The latter have the channels that the block has.
        """
        after = self._stream.after(index)
        channels = None if self._teacher is None else self._teacher.channels
        return self._stream.before(index), after if channels is None else SelectedChannels(after, channels)

    def write(self, index: int, module: Any, outputs: Outputs | None = None) -> None:
        """Write the outputs of the original's part for a block.

        Args:
            module: the loaded block as it came, which is the original's where there is no teacher.
            outputs: the outputs, where they are known already.
        """
        before, after = self._stream.before(index), self._stream.after(index)
        if outputs is not None:
            for rows, output in outputs:
                after.write(rows, output)
        elif self._teacher is None:
            self._original.write_outputs(index, module, before, after)
        else:
            source = before  # never written: a resume starts from it
            for number in self._teacher.blocks(index):
                with torch.no_grad(), self._original.streamed.block(number) as original:
                    self._original.write_outputs(number, original, source, after)
                source = after
        after.sync()
        self._executor.processes.barrier()  # reconstruction reads samples of other processes too

    def close(self) -> None:
        """Close the files; they stay on the disk."""
        self._stream.close()
