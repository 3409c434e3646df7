"""Divergence of a model's predictions without some of its blocks, on hidden states that are kept.

The hidden states in front of each block are kept in files: those of the original, and of the model without the blocks that were
removed so far. A trial without block i starts from the states in front of it, and trials that lack the same blocks up to some
place share the way there. One block is in memory at a time. A model whose blocks read more than hidden states is run whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from compress.architectures.model_map import model_map
from compress.blockwise.activations import Activations
from compress.blockwise.executor import BlockExecutor
from compress.blockwise.inputs import Inputs
from compress.blockwise.memory_budget import LOGITS_PER_CHUNK, STATES_BYTES, TOKENS_PER_BATCH
from compress.errors import PassError, one_line
from compress.models.blocks import find_blocks
from compress.models.classes import arguments_of
from compress.models.loading import load_for_samples, reading_several
from compress.sensitivity.block_influence import angular_distance
from compress.sensitivity.depth_reference import Reference, counts_of

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.data.batches import Batches

#: Numbers of the blocks that a trial lacks, ascending.
BlockSet = tuple[int, ...]
#: Largest difference of predictions on kept states from those of the whole model, relative to the largest prediction.
_TOLERANCE = 1e-4


class Trials(Protocol):
    """Measures a model without some of its blocks.

    Attributes:
        depth: number of blocks. length: tokens of a sample, padding included. counts: predictions of each sample that count.
    """

    depth: int
    length: int
    counts: list[int]

    def losses(self, sets: Sequence[BlockSet], rows: Sequence[int], base: BlockSet) -> list[list[float]]:
        """Divergence from the original's predictions by set and sample, mean over the predictions that count.

        Args:
            sets: the blocks that each trial lacks. base: the blocks that are removed already.
        """
        ...

    def angles(self, pairs: Sequence[tuple[int, int]], rows: Sequence[int]) -> list[float]:
        """Angular distances of the original's hidden states in front of the second block of a pair from those of the first."""
        ...

    def close(self) -> None:
        """Remove what was kept."""
        ...


class KeptStates:
    """Trials on kept hidden states; see `Trials`.

    Args:
        place: folder for files of hidden states, at most 2 × (blocks + 1) × samples of them.

    Raises:
        PassError: the model cannot be run block by block, or its head reads more than the last hidden states.
    """

    def __init__(self, checkpoint: Checkpoint, samples: Batches, place: Path, *, dtype: str, device: str) -> None:
        inputs = Inputs(samples.values, samples.mask, samples.target_mask)
        self._executor = BlockExecutor(checkpoint, inputs, dtype=dtype, device=device)
        self._streamed, self._place, self._mask = self._executor.streamed, place, samples.mask
        self.depth = self._executor.depth
        if len(self._streamed.lists) != 1:
            raise PassError("its blocks are in several lists")
        self._executor.learn_calls()
        model: Any = reading_several(self._streamed.model)
        self._predicts = model.base_model is not model
        for left in place.glob("*.act"):  # by a process that was killed
            left.unlink()
        self._files: dict[tuple[BlockSet, int], Activations] = {}
        self._written: dict[tuple[BlockSet, int], set[int]] = {}
        self._row = tuple(self._executor.first_hidden([0]).shape[1:])
        # a class may read tokens of its own in front of the text, and predict none of these
        self._some = "logits_to_keep" in arguments_of(model) and self._predicts and self._row[0] == inputs.length
        self.length = prod(self._row[:-1])
        self.counts = self._checked()

    # ---- the model as it is ----

    def _checked(self) -> list[int]:
        """Number of predictions that count, by sample; once the first sample's are those of the whole model."""

        def whole(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self._streamed.block(index) as module:
                return module(hidden, *args, **kwargs)

        executor = self._executor
        try:
            with torch.no_grad(), self._streamed.head():
                expected = self._streamed.predict(executor.inputs.rows([0]), whole, {}).float()
                actual = executor.logits([0], self._states([()], [0], ())[()], {}).float()
        except (TypeError, IndexError, ValueError, RuntimeError, AttributeError, KeyError) as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            raise PassError(f"its head cannot be run on hidden states ({one_line(error)})") from None
        self._forget(None)  # a batch of other samples rounds differently
        difference, scale = float((actual - expected).abs().max()), float(expected.abs().max())
        if actual.shape != expected.shape or not difference <= _TOLERANCE * max(scale, 1e-6):
            raise PassError(f"predictions on kept hidden states differ by {difference:.3g} from the model's")
        return counts_of(expected, self._mask, executor.samples)

    # ---- trials ----

    def losses(self, sets: Sequence[BlockSet], rows: Sequence[int], base: BlockSet) -> list[list[float]]:
        """See `Trials.losses`."""
        self._forget(base)
        executor = self._executor
        bytes_ = prod(self._row) * torch.empty((), dtype=executor.dtype).element_size()
        result = torch.zeros(len(sets), len(rows), dtype=torch.float64)
        with torch.no_grad():
            done = 0
            for some in self._batches(rows):
                at_once = max(1, STATES_BYTES // (bytes_ * len(some)))
                for first in range(0, len(sets), at_once):
                    part = sets[first : first + at_once]
                    ends = self._states([(), *part], some, base)
                    result[first : first + len(part), done : done + len(some)] = self._compared(part, ends, some)
                done += len(some)
        counts = torch.tensor([self.counts[row] for row in rows], dtype=torch.float64)
        values: list[list[float]] = (result / counts).tolist()
        return values

    def _compared(
        self, sets: Sequence[BlockSet], ends: Mapping[BlockSet, torch.Tensor], rows: Sequence[int]
    ) -> torch.Tensor:
        """Divergences summed over the predictions of each sample, [sets, rows]."""
        executor, length = self._executor, self._row[0]
        result = torch.zeros(len(sets), len(rows), dtype=torch.float64)
        size = max(1, LOGITS_PER_CHUNK // length)
        step = LOGITS_PER_CHUNK if self._some else length
        with self._streamed.head():
            for start in range(0, len(rows), size):
                own, place = rows[start : start + size], slice(start, start + size)
                for token in range(0, length, step):
                    positions = torch.arange(token, min(token + step, length), device=executor.device)
                    extra = {"logits_to_keep": positions} if self._some else {}
                    mask = None if self._mask is None else self._mask[own].to(executor.device)
                    if mask is not None and self._some:
                        mask = mask[:, positions]
                    before = Reference(executor.logits(own, ends[()][place], extra).float(), mask, self._predicts)
                    for number, blocks in enumerate(sets):
                        after = executor.logits(own, ends[blocks][place], extra).float()
                        result[number, place] += before.divergences(after).cpu()
        return result

    # ---- hidden states ----

    def _states(self, sets: Sequence[BlockSet], rows: Sequence[int], base: BlockSet) -> dict[BlockSet, torch.Tensor]:
        """Hidden states behind the last block without each set, [len(rows), …]; what is kept is read, or written.

        Kept are the states in front of each block of the original, and of the model without ``base``.
        """
        executor = self._executor
        starts = {blocks: self._start(blocks, rows) for blocks in set(sets)}
        live: dict[BlockSet, torch.Tensor] = {}
        for index in range(min(starts.values()), self.depth + 1):
            for blocks, start in starts.items():
                if start == index:
                    live[_up_to(blocks, index)] = self._read(_up_to(blocks, index), index, rows)
            if index == self.depth:
                break
            under_way = [blocks for blocks, start in starts.items() if start <= index]
            run = {_up_to(blocks, index) for blocks in under_way if index not in blocks}
            after = {_up_to(blocks, index + 1): live[_up_to(blocks, index)] for blocks in under_way if index in blocks}
            if run:
                with self._streamed.block(index) as module:
                    for blocks in sorted(run):
                        # a block may write into its input, which other trials read too
                        after[blocks] = executor.forward(index, module, rows, live[blocks].clone())
            for blocks in after:
                if blocks in ((), _up_to(base, index + 1)):
                    self._write(blocks, index + 1, rows, after[blocks])
            live = after
        return {blocks: live[blocks] for blocks in starts}

    def _start(self, blocks: BlockSet, rows: Sequence[int]) -> int:
        """The last block in front of which the states of all those samples are kept; 0 where none are."""
        kept = (
            i for i in range(self.depth, 0, -1) if self._written.get((_up_to(blocks, i), i), set()).issuperset(rows)
        )
        return next(kept, 0)

    def _read(self, blocks: BlockSet, index: int, rows: Sequence[int]) -> torch.Tensor:
        if index == 0:
            return self._executor.first_hidden(rows)
        return self._files[blocks, index].read(rows).to(self._executor.device)

    def _write(self, blocks: BlockSet, index: int, rows: Sequence[int], states: torch.Tensor) -> None:
        if tuple(states.shape[1:]) != self._row:
            raise PassError(f"{self._streamed.title_of(index - 1)} gives hidden states of another shape than it reads")
        key = blocks, index
        if self._written.setdefault(key, set()).issuperset(rows):
            return
        if key not in self._files:
            name = "-".join(map(str, blocks)) or "all"
            path = self._place / f"{name}.{index}.act"
            self._files[key] = Activations(path, self._executor.samples, self._row, self._executor.dtype)
        self._files[key].write(rows, states)
        self._written[key].update(rows)

    def _forget(self, base: BlockSet | None) -> None:
        """Remove the files that are neither the original's nor lead to the model without ``base``; all with None."""
        for blocks, index in list(self._files):
            if base is None or blocks not in ((), _up_to(base, index)):
                file = self._files.pop((blocks, index))
                file.close()
                file.path.unlink(missing_ok=True)
                self._written.pop((blocks, index))

    def angles(self, pairs: Sequence[tuple[int, int]], rows: Sequence[int]) -> list[float]:
        """See `Trials.angles`."""
        angles: list[list[torch.Tensor]] = [[] for _ in pairs]
        for some in self._batches(rows):
            with torch.no_grad():
                self._states([()], some, ())
            for pair, values in zip(pairs, angles, strict=True):
                before, after = (self._read((), index, some) for index in pair)
                mask = None if self._mask is None else self._mask[some].to(before.device)
                values.append(angular_distance(before, after, mask))
        return [float(torch.cat(values).mean()) for values in angles]

    def _batches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Those samples, a batch at a time. The same rows give the same batches, and so the same rounding."""
        executor = self._executor
        tokens = TOKENS_PER_BATCH["cpu" if executor.device == "cpu" else "cuda"]
        size = 1 if executor.calls.turned else max(1, tokens // max(1, executor.inputs.length))
        for start in range(0, len(rows), size):
            yield list(rows[start : start + size])

    def close(self) -> None:
        """See `Trials.close`."""
        self._forget(None)


class WholeModel:
    """Trials that run the whole model; see `Trials`. It is in memory."""

    def __init__(self, checkpoint: Checkpoint, samples: Batches, *, dtype: str, device: str) -> None:
        self._model: Any = load_for_samples(checkpoint, dtype=dtype, device=device)
        self._blocks = find_blocks(self._model, model_map(checkpoint.spec).record)
        self._samples, self._predicts = samples, self._model.base_model is not self._model
        self.depth = len(self._blocks)
        inputs = Inputs(samples.values, samples.mask, samples.target_mask)
        self.length = inputs.length
        with torch.no_grad():
            self.counts = counts_of(self._outputs(0), samples.mask, len(samples.ids))

    def losses(self, sets: Sequence[BlockSet], rows: Sequence[int], base: BlockSet) -> list[list[float]]:
        """See `Trials.losses`."""
        result = [[0.0] * len(rows) for _ in sets]
        with torch.no_grad():
            for place, row in enumerate(rows):
                mask = None if self._samples.mask is None else self._samples.mask[[row]].to(self._model.device)
                before = Reference(self._outputs(row), mask, self._predicts)
                for number, blocks in enumerate(sets):
                    with without(self._blocks, blocks):
                        after = self._runs(row)
                    total = math.inf if after is None else float(before.divergences(after))
                    result[number][place] = total / self.counts[row]
        return result

    def angles(self, pairs: Sequence[tuple[int, int]], rows: Sequence[int]) -> list[float]:
        """See `Trials.angles`."""
        seen: dict[int, torch.Tensor] = {}

        def before(index: int) -> Any:
            return lambda m, a, k: seen.update({index: a[0] if a else k["hidden_states"]})

        def after(m: Any, args: Any, output: Any) -> None:
            seen[self.depth] = output[0] if isinstance(output, (tuple, list)) else output

        handles = [b.register_forward_pre_hook(before(i), with_kwargs=True) for i, b in enumerate(self._blocks)]
        handles.append(self._blocks[-1].register_forward_hook(after))
        angles: list[list[torch.Tensor]] = [[] for _ in pairs]
        try:
            for row in rows:
                with torch.no_grad():
                    self._outputs(row)
                mask = None if self._samples.mask is None else self._samples.mask[[row]].to(seen[0].device)
                for (first, last), values in zip(pairs, angles, strict=True):
                    values.append(angular_distance(seen[first], seen[last], mask))
        finally:
            for handle in handles:
                handle.remove()
        return [float(torch.cat(values).mean()) for values in angles]

    def _runs(self, row: int) -> torch.Tensor | None:
        """Those outputs; None for a model that does not run without some blocks, such as one that changes the width."""
        try:
            return self._outputs(row)
        except RuntimeError as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            return None

    def _outputs(self, row: int) -> torch.Tensor:
        """Logits, or hidden states, of one sample, float32."""
        output: torch.Tensor = self._model(**self._samples.at([row]).inputs(self._model.device))[0]
        return output.float()

    def close(self) -> None:
        """See `Trials.close`."""


@contextmanager
def without(blocks: Any, numbers: Sequence[int]) -> Iterator[None]:
    """Within, those blocks return their input; where a block returns a tuple, it still does."""
    for number in numbers:
        blocks[number].forward = _bypass(blocks[number].forward)
    try:
        yield
    finally:
        for number in numbers:
            del blocks[number].forward


def _bypass(real: Any) -> Any:
    def forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        output = real(hidden_states, *args, **kwargs)
        return (hidden_states, *output[1:]) if isinstance(output, (tuple, list)) else hidden_states

    return forward


def _up_to(blocks: BlockSet, index: int) -> BlockSet:
    """Those in front of a block."""
    return tuple(i for i in blocks if i < index)
