"""The blocks of a model, run one at a time on the calibration samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.blockwise.activations import Activations, ActivationStream, HiddenStates
from compress.blockwise.memory_budget import TOKENS_PER_BATCH
from compress.blockwise.streamed import StreamedModel
from compress.checkpoint.values import Checkpoint
from compress.distributed import ProcessGroup
from compress.errors import CheckpointError, PassError

#: A block's arguments beside its hidden states: positional ones, and those by name.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """Calibration samples: the model's inputs by name, each with samples first, and which tokens count [samples, length]."""

    values: Mapping[str, torch.Tensor]
    mask: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of one sample, padding included; of an image its values."""
        return next(iter(self.values.values())).shape[1:].numel()

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return next(iter(self.values.values())).numel() if self.mask is None else int(self.mask.sum())

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(next(iter(self.values.values())))

    def rows(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The model's arguments for those samples; padding is masked."""
        picked = {name: value[list(rows)] for name, value in self.values.items()}
        return picked if self.mask is None else {**picked, "attention_mask": self.mask[list(rows)].long()}


class BlockExecutor:
    """Runs a checkpoint's blocks on calibration samples, with the weights of one block in memory at a time.

    It is the `BlockView` that blocks hold. Call `learn_calls` before anything else runs.

    Attributes:
        depth: number of blocks. dtype: of the computation.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        inputs: Inputs,
        *,
        dtype: str,
        device: str,
        seed: int = 0,
        processes: ProcessGroup | None = None,
    ) -> None:
        self.checkpoint, self.inputs, self.device, self.seed = checkpoint, inputs, device, seed
        self.processes = processes or ProcessGroup()
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.streamed = StreamedModel(checkpoint, dtype=self.dtype, device=device)
        self.depth = len(self.streamed.blocks)
        self.samples, self.tokens = inputs.samples, inputs.tokens
        self._returns_tuple = False
        self._same_for_all = False
        self._calls: dict[int, list[Call]] = {}

    # ---- samples ----

    def batches(self, first: int | None = None) -> Iterator[list[int]]:
        """Numbers of this process's samples, a batch at a time; with ``first``, of only so many of all samples."""
        size = max(1, TOKENS_PER_BATCH["cpu" if self.device == "cpu" else "cuda"] // max(1, self.inputs.length))
        own = self.processes.shard(range(self.samples)[:first])
        for start in range(0, len(own), size):
            yield own[start : start + size]

    def token_mask(self, rows: Sequence[int]) -> torch.Tensor | None:
        """Which tokens of those samples count, bool [len(rows), length]; None for all."""
        return None if self.inputs.mask is None else self.inputs.mask[list(rows)].to(self.device)

    def keep_mask(self, name: str) -> torch.Tensor | None:
        """The keep-mask that a tensor has in the checkpoint, shaped as there; reads values only where there is one."""
        return None if self.checkpoint.spec.tensors[name].kept is None else self.checkpoint.tensor(name).mask

    # ---- how blocks are called ----

    def learn_calls(self) -> None:
        """Learn whether blocks return tuples, and whether their other arguments depend on the sample.

        Raises:
            PassError: a block reads something else than the output of the block before it.
        """
        blocked: list[int] = []
        for returns_tuple in (False, True):
            self._returns_tuple = returns_tuple
            try:
                _, calls = self._record([0])
            except _NotSequential as error:
                blocked.append(error.index)
            except (TypeError, IndexError, ValueError, RuntimeError, AttributeError):
                blocked.append(0)
            else:
                break
        else:
            raise PassError(
                f"{type(self.streamed.model).__name__} cannot run block by block: block {max(blocked)} reads more than the "
                "output of the block before it",
                fix="use a method that needs no calibration",
            )
        other = self._record([self.samples - 1])[1]
        self._same_for_all = self.inputs.mask is None and all(_equal(a, b) for a, b in zip(calls, other, strict=True))

    def _record(self, rows: Sequence[int]) -> tuple[torch.Tensor, list[Call]]:
        """First hidden states, and each block's arguments, from a run with recorders in place of the blocks."""
        recorder = _CallRecorder(self._returns_tuple)
        self.streamed.run(self.inputs.rows(rows), recorder)
        if len(recorder.calls) != self.depth:
            raise _NotSequential(len(recorder.calls))
        return recorder.first, recorder.calls

    def _calls_for(self, rows: Sequence[int]) -> list[Call]:
        """Arguments of each block for those samples; where all samples have the same, they are recorded once per batch size."""
        if self._same_for_all and len(rows) in self._calls:
            return self._calls[len(rows)]
        _, calls = self._record(rows)
        if self._same_for_all:
            self._calls[len(rows)] = calls
        return calls

    # ---- running ----

    def first_hidden(self, rows: Sequence[int]) -> torch.Tensor:
        """Hidden states in front of the first block, of those samples."""
        return self._record(rows)[0]

    def forward(self, index: int, module: Any, rows: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
        """Outputs of a loaded block for those samples and hidden states [len(rows), …]."""
        args, kwargs = self._calls_for(rows)[index]
        output = module(hidden, *args, **kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def logits(self, rows: Sequence[int], hidden: torch.Tensor, extra: Mapping[str, Any]) -> torch.Tensor:
        """The model's logits for those samples where the last block outputs ``hidden``; the head must be loaded.

        Args:
            extra: further arguments of the model.
        """

        def stub(index: int, before: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            after = hidden if index == self.depth - 1 else before
            return (after,) if self._returns_tuple else after

        return self.streamed.predict(self.inputs.rows(rows), stub, extra)

    def open_stream(self, folder: Path, name: str, *, first: int | None = None, files: int = 2) -> ActivationStream:
        """Files for hidden states in front of blocks, of all samples or the first so many; nothing is written yet."""
        shape = tuple(self.first_hidden([0]).shape[1:])
        samples = self.samples if first is None else first
        return ActivationStream(folder, name, samples, shape, self.dtype, files=files)

    def write_first(self, target: Activations, first: int | None = None) -> None:
        """Write the hidden states in front of the first block, of this process's samples."""
        for rows in self.batches(first):
            target.write(rows, self.first_hidden(rows))

    def write_outputs(
        self,
        index: int,
        module: Any,
        source: HiddenStates,
        target: Activations,
        *,
        first: int | None = None,
        finite: bool = False,
    ) -> None:
        """Write a loaded block's outputs for this process's samples.

        Args:
            source: the block's inputs. first: only so many of all samples. finite: refuse NaN and infinite outputs.

        Raises:
            CheckpointError: an output is not finite.
        """
        with torch.no_grad():
            for rows in self.batches(first):
                output = self.forward(index, module, rows, source.read(rows).to(self.device))
                if finite:
                    self.check_finite(index, output)
                target.write(rows, output)

    def check_finite(self, index: int, output: torch.Tensor) -> None:
        """Raises `CheckpointError` where block ``index`` outputs NaN or infinite values."""
        if not torch.isfinite(output).all():
            raise CheckpointError(f"block {index} gives NaN or infinite values", where=str(self.checkpoint.folder))


class _CallRecorder:
    """Stands in for every block: records its arguments and returns its hidden states unchanged."""

    first: torch.Tensor

    def __init__(self, returns_tuple: bool) -> None:
        self.calls: list[Call] = []
        self._returns_tuple = returns_tuple
        self._previous: torch.Tensor | None = None

    def __call__(self, index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index == 0:
            self.first = hidden
        elif index != len(self.calls) or hidden is not self._previous:
            raise _NotSequential(index)
        self.calls.append((args, {k: _without_cache(v) for k, v in kwargs.items()}))
        self._previous = hidden
        return (hidden,) if self._returns_tuple else hidden


class _NotSequential(Exception):
    """A block is not fed by the block before it alone."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def _without_cache(value: Any) -> Any:
    return None if type(value).__name__.endswith("Cache") else value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return (
            isinstance(b, (tuple, list)) and len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return bool(a == b) if not hasattr(a, "__dict__") else a is b or type(a) is type(b)
