"""Hidden states behind a model's last block, with one block in memory at a time, and what differs between two models there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.blockwise.activations import Activations
from compress.blockwise.executor import BlockExecutor
from compress.blockwise.inputs import Inputs
from compress.blockwise.memory_budget import LOGITS_PER_CHUNK
from compress.models.classes import arguments_of
from compress.models.loading import reading_several
from compress.sensitivity.depth_reference import Reference, counts_of

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.data.batches import Batches


class LastStates:
    """Hidden states behind the last block of a checkpoint whose blocks are in one list.

    Attributes:
        executor: of the checkpoint.
    """

    def __init__(self, executor: BlockExecutor, states: Activations) -> None:
        self.executor, self._states = executor, states
        model: Any = executor.streamed.model
        self.predicts = model.base_model is not model
        # a class may read tokens of its own in front of the text, and predict none of these
        own = states.shape[0] == executor.inputs.length
        self._some = "logits_to_keep" in arguments_of(model) and self.predicts and own

    def outputs(self, rows: Sequence[int]) -> Iterator[tuple[torch.Tensor, slice]]:
        """Yield logits of those samples, or hidden states, float32, and which tokens they are of; the head must be loaded."""
        hidden = self._states.read(rows).to(self.executor.device)
        length = int(self._states.shape[0])
        step = LOGITS_PER_CHUNK if self._some else length
        for start in range(0, length, step):
            positions = torch.arange(start, min(start + step, length), device=hidden.device)
            extra = {"logits_to_keep": positions} if self._some else {}
            yield self.executor.logits(rows, hidden, extra).float(), slice(start, start + step)


@contextmanager
def last_states(
    checkpoint: Checkpoint, samples: Batches, *, dtype: str, device: str, work: Path
) -> Iterator[LastStates]:
    """Run a checkpoint on samples; within, its last hidden states are in files.

    Args:
        work: folder of files that are removed at the end.
    """
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix="ends-") as folder:
        inputs = Inputs(samples.values, samples.mask, samples.target_mask)
        executor = BlockExecutor(checkpoint, inputs, dtype=dtype, device=device)
        executor.streamed.map_tables(Path(folder))
        reading_several(executor.streamed.model)
        executor.learn_calls()
        stream = executor.open_stream(Path(folder), "states")
        executor.enter(0, stream)
        for index in range(executor.depth):
            with executor.streamed.block(index) as module:
                executor.write_outputs(index, module, stream.before(index), stream.after(index))
        yield LastStates(executor, stream.after(executor.depth - 1))
        stream.close()


def divergence_by_blocks(
    before: Checkpoint, after: Checkpoint, samples: Batches, *, dtype: str, device: str, work: Path
) -> float:
    """Change of the outputs from one checkpoint to another, mean over what counts: KL in nats, or of models without a head the
    squared error of hidden states over their variance in a sample. One block is in memory, and then both heads.
    """
    total, count = 0.0, 0
    with ExitStack() as stack, torch.no_grad():
        ends = [
            stack.enter_context(last_states(one, samples, dtype=dtype, device=device, work=work))
            for one in (before, after)
        ]
        for end in ends:
            stack.enter_context(end.executor.streamed.head())
        for row in range(len(samples.ids)):
            mask = None if samples.mask is None else samples.mask[[row]].to(device)
            for (reference, tokens), (changed, _) in zip(*(end.outputs([row]) for end in ends), strict=True):
                part = mask if mask is None or reference.ndim == 2 else mask[:, tokens]
                total += float(Reference(reference, part, ends[0].predicts).divergences(changed))
                count += sum(counts_of(reference, part, 1))
    return total / max(count, 1)
