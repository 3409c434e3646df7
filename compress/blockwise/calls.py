"""The arguments that a model passes to its blocks, recorded from a run of the model with recorders in the blocks' places.

Blocks run in lists: one list, or an encoder's and then a decoder's. The blocks of a decoder also read what the encoder outputs,
so their arguments are recorded with the encoder's last recorder returning the hidden states that its last block really output.
Some models have the first block of a list compute something that it hands on to the others, such as T5's biases of
positions. The recorder of the first block then returns what that block really computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from compress.blockwise.activations import HiddenStates
from compress.blockwise.arguments import Call, equal, leaves, recorded
from compress.blockwise.inputs import Inputs
from compress.blockwise.layout import SampleLayout, layout_of
from compress.blockwise.streamed import StopForward, StreamedModel
from compress.errors import PassError, one_line

#: Words for a block that the model leaves out, such as cross-attention to images where there are none.
NOT_RUN = "is not run on the calibration data"
#: What the user can do where blocks cannot run one by one.
FIX = "use a method that needs no calibration"


@dataclass
class Handed:
    """Values that the first block of a list hands on to the others, beside hidden states.

    Attributes:
        block: the first block, with the parameters that these values depend on; all others are zeros that take no memory.
        parameters: names of those parameters.
    """

    block: Any
    parameters: list[str]


@dataclass
class ListCalls:
    """How the blocks of one list are called.

    Attributes:
        values: number of values that a block returns; None where it returns its hidden states alone.
        handed: what the first block hands on; None where it hands on hidden states alone.
        same: whether all samples have the same arguments. known: these arguments by number of samples.
        length: positions of a sample's hidden states [samples, length, h]; 0 where they have other axes.
        outputs: number of a block ▶ shape of its output for one sample, where it is not the shape of its input.
        left_out: numbers of the blocks that the model does not run on these data.
        layout: where samples are in the hidden states.
    """

    values: int | None = None
    handed: Handed | None = None
    same: bool = False
    left_out: frozenset[int] = frozenset()
    layout: SampleLayout = field(default_factory=SampleLayout)
    known: dict[int, list[Call]] = field(default_factory=dict)
    length: int = 0
    outputs: dict[int, torch.Size] = field(default_factory=dict)


class BlockCalls:
    """Records the arguments of blocks. Call `learn` before anything else.

    Attributes:
        ends: place of a list ▶ hidden states behind its last block; see `end`.
    """

    def __init__(self, streamed: StreamedModel, inputs: Inputs) -> None:
        self.streamed, self.inputs = streamed, inputs
        self.ends: dict[int, HiddenStates] = {}
        self._lists = [ListCalls() for _ in streamed.lists]

    def beside(self) -> BlockCalls:
        """The same knowledge for blocks with other weights, whose lists end in other hidden states."""
        other = BlockCalls(self.streamed, self.inputs)
        other._lists = [replace(one, known={}) for one in self._lists]
        return other

    def end(self, place: int, states: HiddenStates) -> None:
        """Set the hidden states behind the last block of a list, before calls of later lists are asked for."""
        self.ends[place] = states
        for one in self._lists[place + 1 :]:
            one.known.clear()

    # ---- learning ----

    def learn(self) -> None:
        """Learn what blocks return and hand on, and whether their other arguments depend on the sample.

        Raises:
            PassError: a block reads something else than the output of the block before it.
        """
        shapes = self._learn_shapes()
        for place, one in enumerate(self.streamed.lists):
            own = {index: shape for index, shape in shapes.items() if one.first <= index < one.end}
            self._lists[place] = ListCalls(outputs=own)
        for place, one in enumerate(self.streamed.lists):
            try:
                self._learn_returns(place)
                recorder = self._recorded(place, [0])
                self._lists[place].left_out = frozenset(recorder.left_out)
                last = self.inputs.samples - 1
                calls, others = recorder.calls, self._record(place, [last])[1]
                self._learn_layout(place, recorder.first, self._record(place, [0, last], until=one.first)[0])
                hidden = self.samples_first(one.first, recorder.first)
                self._lists[place].length = hidden.shape[1] if hidden.ndim == 3 else 0
            except _NotSequential as error:
                raise self._refusal(error.index, error.reason) from None
            except (TypeError, IndexError, ValueError, RuntimeError, AttributeError, KeyError) as error:
                if type(error).__name__ == "OutOfMemoryError":
                    raise
                raise self._refusal(one.first, f"cannot be run in its place ({_short(error)})") from None
            masked = self.inputs.mask is not None or self.inputs.target_mask is not None
            self._lists[place].same = not masked and all(equal(a, b) for a, b in zip(calls, others, strict=True))
        self._check_once()

    def _learn_shapes(self) -> dict[int, torch.Size]:
        """Shapes of the outputs of blocks for one sample, by number, where these are not the shapes of their inputs.

        Stages of models of images differ in width and resolution, and text is not read in stages.
        """
        shapes: dict[int, torch.Size] = {}
        if self.streamed.record.input == "input_ids":
            return shapes

        def stub(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before = hidden.shape
            with self.streamed.block(index) as module:
                output = module(hidden, *args, **kwargs)
            after = (output[0] if isinstance(output, (tuple, list)) else output).shape
            if after != before:
                shapes[index] = after
            return output

        with suppress(Exception):  # what fails is named where blocks are recorded
            self.streamed.run(self.inputs.rows([0]), stub)
        return shapes

    def _learn_layout(self, place: int, single: torch.Tensor, double: torch.Tensor) -> None:
        """Learn where samples and tokens are in the hidden states, from those of one sample and of two."""
        layout = layout_of(single, double, self.inputs.length)
        if layout is None or (layout != SampleLayout() and self._lists[place].outputs):
            first = self.streamed.lists[place].first
            raise self._refusal(first, "reads hidden states that are not laid out by sample")
        self._lists[place].layout = layout

    def _check_once(self) -> None:
        """Raise `PassError` where a model runs a block more than once, as ALBERT and models that loop over their blocks do."""
        seen: set[int] = set()

        def stub(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index in seen:
                raise self._refusal(index, "is run more than once")
            seen.add(index)
            return self.returned(index, self.stand_in(index, hidden))

        try:
            self.streamed.run(self.inputs.rows([0]), stub)
        except PassError:
            raise
        except Exception as error:  # a head without weights, behind the last block
            due = [i for i in range(len(self.streamed.layers)) if i not in seen and not self.is_left_out(i)]
            if due:
                raise self._refusal(due[0], f"cannot be run in its place ({_short(error)})") from error

    def _refusal(self, index: int, reason: str) -> PassError:
        model = type(self.streamed.model).__name__
        return PassError(f"{model} cannot run block by block: {self.streamed.title_of(index)} {reason}", fix=FIX)

    def _learn_returns(self, place: int) -> None:
        """Run the first block of a list for what it returns, and find out what other blocks read of that."""
        one, own = self.streamed.lists[place], self._lists[place]
        first, calls = self._record(place, [0], until=one.first)
        with self.streamed.block(one.first) as block, _with_gradients(block):
            hidden = first.detach().clone().requires_grad_()
            args, kwargs = calls[0]
            output = block(hidden * 1, *args, **kwargs)  # a leaf could not be changed in place
            if not isinstance(output, (tuple, list)):
                return
            own.values = len(output)
            passed = self._passed(place, [x.detach() if isinstance(x, torch.Tensor) else x for x in output[1:]])
            if not passed:
                return
            names = _depends_on(block, hidden, [output[1 + i] for i in passed])
            if names is None:
                raise self._refusal(one.first, "hands more than its hidden states to later blocks")
            own.handed = Handed(_reduced(block, names), sorted(names))

    def _passed(self, place: int, values: Sequence[Any]) -> list[int]:
        """Places, among values that the first block of a list returns beside hidden states, of those that other blocks read."""
        recorder = _Recorder(self, place, [0], self.streamed.lists[place].end - 1, tuple(values))
        self.streamed.run(self.inputs.rows([0]), recorder)
        return [i for i, x in enumerate(values) if isinstance(x, torch.Tensor) and recorder.has_read(x)]

    # ---- recording ----

    def of(self, index: int, rows: Sequence[int]) -> Call:
        """Arguments of a block for those samples; the same ones of all samples are recorded once per number of samples."""
        place = self.streamed.list_of(index)
        own, first = self._lists[place], self.streamed.lists[place].first
        if own.same and len(rows) in own.known:
            return own.known[len(rows)][index - first]
        calls = self._record(place, rows, until=None if own.same else index)[1]
        if own.same:
            own.known[len(rows)] = calls
        return calls[index - first]

    def first_hidden(self, rows: Sequence[int], place: int = 0) -> torch.Tensor:
        """Hidden states in front of the first block of a list, of those samples, which come first."""
        first = self.streamed.lists[place].first
        return self.samples_first(first, self._record(place, rows, until=first)[0])

    def is_left_out(self, index: int) -> bool:
        """Whether the model does not run a block on these data, such as cross-attention to images where there are none."""
        return index in self._lists[self.streamed.list_of(index)].left_out

    @property
    def turned(self) -> bool:
        """Whether samples are not first in the hidden states of some list."""
        return any(one.layout.order is not None for one in self._lists)

    def samples_first(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states around a block as the model lays them out ▶ with the samples first, then tokens."""
        return self._lists[self.streamed.list_of(index)].layout.samples_first(hidden)

    def as_in_model(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states around a block with the samples first ▶ as the model lays them out."""
        return self._lists[self.streamed.list_of(index)].layout.as_in_model(hidden)

    def shape_behind(self, index: int, before: Sequence[int]) -> torch.Size:
        """Shape of one sample's hidden states [1, …] behind a block; ``before``: the shape in front of it."""
        shape = self._lists[self.streamed.list_of(index)].outputs.get(index)
        return torch.Size(before) if shape is None else shape

    def stand_in(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of the shape that a block outputs, which differ by sample as its inputs do."""
        shape = self.shape_behind(index, hidden.shape)[1:]
        if shape == hidden.shape[1:]:
            return hidden.view_as(hidden)
        values, count = hidden.flatten(1), shape.numel()
        return values.repeat(1, -(-count // values.shape[1]))[:, :count].view(-1, *shape)

    def returned(self, index: int, hidden: torch.Tensor) -> Any:
        """The return value of a block with the output ``hidden``, for models that read nothing else of it."""
        values = self._lists[self.streamed.list_of(index)].values
        return hidden if values is None else (hidden, *[None] * (values - 1))

    def length(self, place: int) -> int:
        """Positions of a sample's hidden states in a list; 0 where they are not [samples, positions, h]."""
        return self._lists[place].length

    def handed_on(self, index: int) -> list[str]:
        """Names of the block's parameters that give what it hands on to later blocks, which must stay as they are."""
        place = self.streamed.list_of(index)
        handed = self._lists[place].handed
        return handed.parameters if handed is not None and index == self.streamed.lists[place].first else []

    def _record(self, place: int, rows: Sequence[int], until: int | None = None) -> tuple[torch.Tensor, list[Call]]:
        """First hidden states of a list, and the arguments of its blocks up to block ``until`` (None: all)."""
        recorder = self._recorded(place, rows, until)
        if other := recorder.left_out ^ {i for i in self._lists[place].left_out if i <= recorder.last}:
            raise _NotSequential(min(other), "runs on some samples alone")
        return recorder.first, recorder.calls

    def _recorded(self, place: int, rows: Sequence[int], until: int | None = None) -> _Recorder:
        """The recorder after a run of the model. Raises `_NotSequential` where the first block is not run."""
        one = self.streamed.lists[place]
        recorder = _Recorder(self, place, rows, one.end - 1 if until is None else until)
        self.streamed.run(self.inputs.rows(rows), recorder)
        if not recorder.calls:
            raise _NotSequential(one.first, NOT_RUN)
        recorder.skip_to(recorder.last + 1)
        return recorder


class _Recorder:
    """Stands in for every block. Records the arguments in one list, up to a last block, and returns hidden states unchanged.

    Args:
        last: number of the last block to record. handed: what blocks return beside hidden states; None for what the first
            block hands on.
    """

    first: torch.Tensor

    def __init__(
        self, owner: BlockCalls, place: int, rows: Sequence[int], last: int, handed: tuple[Any, ...] | None = None
    ) -> None:
        self.calls: list[Call] = []
        self.left_out: set[int] = set()
        self.last = last
        self._owner, self._place, self._rows, self._handed = owner, place, rows, handed
        self._previous: torch.Tensor | None = None

    def __call__(self, index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner = self._owner
        place = owner.streamed.list_of(index)
        if place != self._place:
            ended = place in owner.ends and place < self._place and index == owner.streamed.lists[place].end - 1
            states = owner.stand_in(index, hidden)
            if ended:
                states = owner.as_in_model(index, owner.ends[place].read(self._rows).to(hidden))
            return owner.returned(index, states)
        if index == owner.streamed.lists[place].first:
            self.first = hidden
        elif not self.calls:
            raise _NotSequential(owner.streamed.lists[place].first, NOT_RUN)
        elif hidden is not self._previous or not self.skip_to(min(index, self.last + 1)):
            raise _NotSequential(index, "reads more than the output of the block before it")
        if index <= self.last:
            first = index == owner.streamed.lists[place].first
            self.calls.append(recorded(None if first else hidden, args, kwargs))
        if index >= self.last:
            raise StopForward
        if self._handed is None and (handed := owner._lists[place].handed) is not None:
            own_args, own_kwargs = self.calls[0]
            self._handed = tuple(handed.block(hidden, *own_args, **own_kwargs)[1:])
        # an object of its own, so that the next block's arguments tell it from the inputs of earlier blocks
        self._previous = hidden = owner.stand_in(index, hidden)
        return owner.returned(index, hidden) if self._handed is None else (hidden, *self._handed)

    def skip_to(self, index: int) -> bool:
        """Note that the model leaves out the blocks due before ``index``; whether ``index`` is the one due then."""
        first = self._owner.streamed.lists[self._place].first
        gap = range(first + len(self.calls), index)
        self.left_out.update(gap)
        self.calls.extend(((), {}) for _ in gap)
        return first + len(self.calls) == index

    def has_read(self, value: torch.Tensor) -> bool:
        """Whether a block was given that tensor."""
        return any(x is value for call in self.calls for x in leaves(call))


class _NotSequential(Exception):
    """A block is not fed by the block before it alone."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index)
        self.index, self.reason = index, reason


@contextmanager
def _with_gradients(block: Any) -> Iterator[None]:
    """Within, results of a loaded block have gradients to its parameters."""
    parameters = [p for p in block.parameters() if p.is_floating_point()]
    for p in parameters:
        p.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p in parameters:
            p.requires_grad_(False)


def _depends_on(block: Any, hidden: torch.Tensor, values: Sequence[torch.Tensor]) -> set[str] | None:
    """Names of the parameters that the values depend on; None where they depend on the hidden states."""
    names: set[str] = set()
    parameters: dict[str, torch.Tensor] = {n: p for n, p in block.named_parameters() if p.is_floating_point()}
    for value in (v for v in values if v.requires_grad):
        grads: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
            value.sum(), [hidden, *parameters.values()], retain_graph=True, allow_unused=True
        )
        if grads[0] is not None:
            return None
        names |= {name for name, grad in zip(parameters, grads[1:], strict=True) if grad is not None}
    return names


def _reduced(block: Any, names: set[str]) -> Any:
    """A copy of a loaded block with only those parameters; the others are zeros that take no memory."""
    memo: dict[int, Any] = {
        id(p): torch.nn.Parameter(torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape), requires_grad=False)
        for name, p in block.named_parameters()
        if name not in names
    }
    return copy.deepcopy(block, memo)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
