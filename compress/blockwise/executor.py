"""The blocks of a model, run one at a time on the calibration samples."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from compress.architectures.model_map import model_map
from compress.blockwise.activations import Activations, ActivationStream, BlockStreams, HiddenStates
from compress.blockwise.arguments import Call, filled
from compress.blockwise.calls import BlockCalls
from compress.blockwise.device_room import room_on
from compress.blockwise.functional import projections_as_calls
from compress.blockwise.inputs import Inputs
from compress.blockwise.memory_budget import TOKENS_PER_BATCH
from compress.blockwise.predictions import Predict
from compress.blockwise.streamed import StreamedModel
from compress.checkpoint.values import Checkpoint, torch_dtype
from compress.distributed import ProcessGroup
from compress.errors import CheckpointError, PassError


class BlockExecutor:
    """Runs a checkpoint's blocks on calibration samples, with the weights of one block in memory at a time.

    It is the `BlockView` that blocks hold. Call `learn_calls` before anything else runs.

    Attributes:
        depth: number of blocks. dtype: of the computation. proven, spare, room: see `BlockView`.
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
        max_vram: int | None = None,
    ) -> None:
        self.checkpoint, self.inputs, self.device, self.seed = checkpoint, inputs, device, seed
        self.processes = processes or ProcessGroup()
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.streamed = StreamedModel(checkpoint, dtype=self.dtype, device=device)
        self.depth = len(self.streamed.layers)
        self.samples, self.tokens = inputs.samples, inputs.tokens
        self.calls = BlockCalls(self.streamed, inputs)
        self.proven: set[str] = set()
        self.spare: list[IO[bytes]] = []
        self.room = room_on(device, max_vram)

    # ---- samples ----

    def batches(self, first: int | None = None) -> Iterator[list[int]]:
        """Numbers of this process's samples, a batch at a time; with ``first``, of only so many of all samples."""
        # where samples are not first in the model, a batch of more would mix up tokens in what its layers read
        tokens = TOKENS_PER_BATCH["cpu" if self.device == "cpu" else "cuda"]
        size = 1 if self.calls.turned else max(1, tokens // max(1, self.inputs.length))
        own = self.processes.shard(range(self.samples)[:first])
        for start in range(0, len(own), size):
            yield own[start : start + size]

    def token_masks(self, rows: Sequence[int], index: int) -> tuple[torch.Tensor, ...]:
        """Which tokens of those samples count: in front of a block, bool [len(rows), length], then those of the encoder.

        Empty where all tokens count. The lengths differ.
        """
        return tuple(mask.to(self.device) for mask in self._masks(rows, self.streamed.list_of(index)))

    def _masks(self, rows: Sequence[int], place: int) -> tuple[torch.Tensor, ...]:
        return self.inputs.masks(rows, [self.calls.length(one) for one in range(place + 1)])

    def token_mask(self, rows: Sequence[int], index: int = 0) -> torch.Tensor | None:
        """Which tokens of those samples count in front of a block, bool [len(rows), length]; None for all."""
        masks = self._masks(rows, place := self.streamed.list_of(index))
        own = self.inputs.mask if place == 0 else self.inputs.target_mask
        return None if own is None else masks[0].to(self.device)

    def keep_mask(self, name: str) -> torch.Tensor | None:
        """The keep-mask that a tensor has in the checkpoint, shaped as there; reads values only where there is one."""
        return None if self.checkpoint.spec.tensors[name].kept is None else self.checkpoint.tensor(name).mask

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor has in the checkpoint."""
        return torch_dtype(self.checkpoint.spec.tensors[name].dtype)

    # ---- running ----

    def learn_calls(self) -> None:
        """Learn how blocks are called; see `BlockCalls.learn`. Raises `PassError`."""
        self.calls.learn()
        if len(self.streamed.lists) > 1 and (inputs := self.inputs.apart(self.calls.length(0))) is not self.inputs:
            frames, longest = self.calls.length(0), self._longest()
            problem = PassError(
                f"texts of the decoder are as long as what the encoder outputs, {frames} positions, so that their masks cannot "
                "be told apart, and the decoder takes no longer ones",
                fix="give texts that are shorter by a token",
            )
            if longest is not None and frames >= longest:
                raise problem
            self.inputs, self.calls = inputs, BlockCalls(self.streamed, inputs)
            try:
                self.calls.learn()  # no table may be longer than a config says
            except PassError as error:
                raise problem from error

    def _longest(self) -> int | None:
        """Tokens of the longest text that the decoder takes, as far as table and config tell; None where they do not."""
        mapped = model_map(self.checkpoint.spec)
        own = mapped.config.get("max_target_positions")
        return own if isinstance(own, int) else mapped.trained_positions

    def beside(self) -> BlockExecutor:
        """The same executor for the same blocks with other weights, whose lists end in other hidden states."""
        other = copy.copy(self)
        other.calls = self.calls.beside()
        return other

    def is_first(self, index: int) -> bool:
        """Whether a block is the first of its list."""
        return any(index == one.first for one in self.streamed.lists)

    def first_hidden(self, rows: Sequence[int], index: int = 0) -> torch.Tensor:
        """Hidden states in front of the first block of the list that block ``index`` is in, of those samples."""
        return self.calls.first_hidden(rows, self.streamed.list_of(index))

    def arguments(self, index: int, rows: Sequence[int]) -> Call:
        """Arguments of a block beside hidden states, for those samples."""
        return self.calls.of(index, rows)

    def forward(self, index: int, module: Any, rows: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
        """Outputs of a loaded block for those samples and hidden states [len(rows), …]; these where the model leaves it out."""
        return hidden if self.calls.is_left_out(index) else self.run(index, module, hidden, self.arguments(index, rows))

    def run(self, index: int, module: Any, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Outputs of a loaded block for hidden states with their samples first, and other arguments."""
        hidden = self.calls.as_in_model(index, hidden)
        args, kwargs = filled(call, hidden)
        with projections_as_calls(module):
            output = module(hidden, *args, **kwargs)
        result: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return self.calls.samples_first(index, result)

    def logits(self, rows: Sequence[int], hidden: torch.Tensor, extra: Mapping[str, Any]) -> torch.Tensor:
        """The model's logits for those samples where the last block outputs ``hidden``; the head must be loaded.

        Args:
            extra: further arguments of the model.
        """

        last = max(index for index in range(self.depth) if not self.calls.is_left_out(index))

        def stub(index: int, before: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            after = self.calls.as_in_model(index, hidden) if index == last else self.calls.stand_in(index, before)
            return self.calls.returned(index, after)

        return self.streamed.predict(self.inputs.rows(rows), stub, extra)

    @contextmanager
    def predictions(self, index: int) -> Iterator[Predict | None]:
        """Within, the head is loaded; yields the logits for hidden states behind block ``index``.

        None where that is not the last block, or the model has no head that predicts tokens.
        """
        model: Any = self.streamed.model
        has_head = self.streamed.record.has_head(self.checkpoint.spec) and model.get_output_embeddings() is not None
        if index != self.depth - 1 or not has_head or self.calls.is_left_out(index):
            yield None
            return
        with self.streamed.head():
            yield lambda rows, hidden: self.logits(rows, hidden, {}).float()

    def open_stream(self, folder: Path, name: str, *, first: int | None = None, files: int = 2) -> BlockStreams:
        """Files for hidden states in front of blocks, of all samples or the first so many; nothing is written yet."""
        samples = self.samples if first is None else first
        lists = []
        for place, one in enumerate(self.streamed.lists):
            shapes = [tuple(self.calls.first_hidden([0], place).shape)]
            for index in range(one.first, one.end):
                shapes.append(tuple(self.calls.shape_behind(index, shapes[-1])))
            title = name if place == 0 else f"{name}-list{place}-"
            each = [shape[1:] for shape in shapes]
            room = self.room if files == 2 else None  # of many files each would take some and keep it
            lists.append(
                (one.first, ActivationStream(folder, title, samples, each, self.dtype, files=files, room=room))
            )
        return BlockStreams(lists)

    def enter(self, index: int, stream: BlockStreams, first: int | None = None) -> None:
        """Make ready to run block ``index``: later lists read how earlier ones ended, and a list's first inputs are written.

        Args:
            stream: holds the hidden states behind the last blocks of earlier lists. first: only so many of all samples.
        """
        for place, one in enumerate(self.streamed.lists[: self.streamed.list_of(index)]):
            self.calls.end(place, stream.after(one.end - 1))
        if self.is_first(index):
            target = stream.before(index)
            for rows in self.batches(first):
                target.write(rows, self.first_hidden(rows, index))
            target.sync()

    def outputs(
        self, index: int, module: Any, source: HiddenStates, first: int | None = None
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield numbers of this process's samples, and a loaded block's outputs for them, a batch at a time.

        Args:
            source: the block's inputs. first: only so many of all samples.
        """
        for rows in self.batches(first):
            with torch.no_grad():
                output = self.forward(index, module, rows, source.read(rows).to(self.device))
            yield rows, output

    def write_outputs(
        self, index: int, module: Any, source: HiddenStates, target: Activations, *, first: int | None = None
    ) -> None:
        """Write a loaded block's outputs for this process's samples; arguments as for `outputs`."""
        for rows, output in self.outputs(index, module, source, first):
            target.write(rows, output)

    def check_finite(self, index: int, output: torch.Tensor) -> None:
        """Raises `CheckpointError` where block ``index`` outputs NaN or infinite values."""
        if not torch.isfinite(output).all():
            title = self.streamed.title_of(index)
            raise CheckpointError(f"{title} gives NaN or infinite values", where=str(self.checkpoint.folder))
