"""The operations of a block, recorded in one forward pass and run again in parts.

A forward pass is Python code, which cannot stop in front of a matrix, wait there until all samples have come as far, and go on
with the matrix changed. A list of its operations can. `record` runs a block once and notes each operation that reaches a
kernel, with the tensors that it reads and makes. A *cut* is the place where a group of matrices reads its inputs. Between two
cuts lies a part of the tape, and `Tape.run` needs for it what is live at the cut before. The operations are those of the block
itself, so that the values are the same to the bit.

A slot is the number of a tensor on a tape. What depends on the block's arguments is computed once. All else (views of weights,
constants) is computed anew in each part that reads it, from the parameters as they are then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from compress.blockwise.linears import first_value
from compress.blockwise.recording import Operation, Recorder, Unrecordable, ValueReads
from compress.blockwise.streamed import StopForward


class Cut(NamedTuple):
    """Where a group reads: in front of which operation, and the slots to show there, that of its inputs first."""

    position: int
    shown: tuple[int, ...]


class _Step(NamedTuple):
    operation: Operation
    dropped: tuple[int, ...]  # slots that nothing reads any more


class _Part(NamedTuple):
    steps: list[_Step]
    live: tuple[int, ...]  # slots that later parts read, and those to show


class Tape:
    """The operations of a block in parts, which end at its cuts; the last one, if ``complete``, at its output.

    Args:
        recorder: what it noted. cuts: in order. output: slot of the block's output; None where the pass was stopped.

    Attributes:
        reach: number of cuts that the tape comes to. complete: whether it comes to the output too.
    """

    def __init__(self, recorder: Recorder, first_constant: int, cuts: Sequence[Cut], output: int | None) -> None:
        self._operations, self._roots = recorder.operations, recorder.roots
        self._given = len(recorder.given)
        self._constants = dict(enumerate(recorder.given[first_constant:], first_constant)) | recorder.constants
        self._dependent = self._depending({self._roots[slot] for slot in range(first_constant)})
        self._output = output
        self._text: str | None = None
        good = [self._follows(cut.shown) for cut in cuts]
        self.reach = good.index(False) if False in good else len(cuts)
        self._cuts = list(cuts[: self.reach])
        self.complete = output is not None and self.reach == len(cuts) and self._follows([output])
        stops = [cut.position for cut in self._cuts] + ([len(self._operations)] if self.complete else [])
        self._parts = [self._part(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]

    def _depending(self, dependent: set[int]) -> set[int]:
        """Roots of the memory that values flow into from memory of those roots."""
        size = 0
        while size != len(dependent):
            size = len(dependent)
            for one in self._operations:
                if any(self._roots[slot] in dependent for slot in (*one.reads, *one.changes)):
                    dependent |= {self._roots[slot] for slot in (*one.makes, *one.changes) if slot is not None}
        return dependent

    def _depends(self, one: Operation) -> bool:
        slots = (*one.reads, *one.changes, *(slot for slot in one.makes if slot is not None))
        return any(self._roots[slot] in self._dependent for slot in slots)

    def _follows(self, slots: Iterable[int]) -> bool:
        return all(self._roots[slot] in self._dependent for slot in slots)

    def _share_memory(self, some: Iterable[int], others: Iterable[int]) -> bool:
        return not {self._roots[slot] for slot in some}.isdisjoint(self._roots[slot] for slot in others)

    def _part(self, start: int, stop: int) -> _Part:
        """The operations between two cuts, with those that are computed anew."""
        own = [one for one in self._operations[start:stop] if self._depends(one)]
        needed = {slot for one in own for slot in one.reads}
        steps: list[Operation] = []
        for number in range(stop - 1, -1, -1):
            one = self._operations[number]
            if self._depends(one):
                if number >= start:
                    steps.append(one)
            elif not needed.isdisjoint(one.makes) or (one.changes and self._share_memory(one.changes, needed)):
                steps.append(one)
                needed |= set(one.reads)
        steps.reverse()
        live = self._live(stop)
        return _Part(_with_drops(steps, {*live, *range(self._given), *self._constants}), live)

    def _live(self, stop: int) -> tuple[int, ...]:
        """Slots of what depends on the arguments, made in front of a cut and read behind it."""
        made = {s for one in self._operations[:stop] if self._depends(one) for s in one.makes if s is not None}
        read = {s for one in self._operations[stop:] if self._depends(one) for s in (*one.reads, *one.changes)}
        read |= {slot for cut in self._cuts if cut.position >= stop for slot in cut.shown}
        read |= set() if self._output is None else {self._output}
        return tuple(sorted(slot for slot in made & read if slot >= self._given))

    def run(
        self, number: int, given: Sequence[torch.Tensor], state: dict[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Run a part; what is live behind it, by slot.

        Args:
            given: hidden states and the block's other tensors, as they were given to `record`.
            state: what is live in front of the part; it is emptied, so that memory is freed on the way.
        """
        values = {**self._constants, **dict(enumerate(given)), **state}
        state.clear()
        with torch.no_grad():
            for operation, dropped in self._parts[number].steps:
                made = zip(operation.makes, operation.call(values), strict=True)
                values.update((slot, value) for slot, value in made if slot is not None)
                del made
                for slot in dropped:
                    values.pop(slot, None)
        return {slot: values[slot] for slot in self._parts[number].live}

    def shown(
        self, number: int, given: Sequence[torch.Tensor], state: Mapping[int, torch.Tensor]
    ) -> list[torch.Tensor]:
        """The tensors to show at a cut."""
        return [_at(slot, given, state) for slot in self._cuts[number].shown]

    def slots_shown(self, number: int) -> Collection[int]:
        """The slots of these tensors."""
        return self._cuts[number].shown

    def output(self, given: Sequence[torch.Tensor], state: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """The block's output, from what is live behind the last part."""
        assert self._output is not None
        return _at(self._output, given, state)

    def stop_at(self, number: int) -> None:
        """Use the tape up to that cut only."""
        self.reach, self.complete = number, False

    def text(self) -> str:
        """The operations as text: tapes with the same text compute the same, but for the values that they are given."""
        if self._text is None:
            lines = [f"{one.function} {one.leaves} {one.makes}" for one in self._operations]
            self._text = "\n".join([*lines, str(self._cuts), str(self._output)])
        return f"{self.reach} {self.complete}\n{self._text}"


def _at(slot: int, given: Sequence[torch.Tensor], state: Mapping[int, torch.Tensor]) -> torch.Tensor:
    return given[slot] if slot < len(given) else state[slot]


def _with_drops(steps: Sequence[Operation], kept: Collection[int]) -> list[_Step]:
    """Operations, each with the slots that no later one reads."""
    seen = set(kept)
    result: list[_Step] = []
    for one in reversed(steps):
        slots = {slot for slot in (*one.reads, *one.makes) if slot is not None}
        result.append(_Step(one, tuple(slots - seen)))
        seen |= slots
    result.reverse()
    return result


def record(
    run: Callable[[], torch.Tensor],
    given: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    groups: Sequence[Sequence[torch.nn.Module]],
    shown: Mapping[int, Sequence[torch.nn.Module]],
) -> Tape:
    """A tape of one pass through a block.

    Args:
        run: the pass. given: hidden states, and the other tensors among the block's arguments.
        parameters: parameters and buffers of the block.
        groups: layers that read the same inputs, in the order in which they read; each reads once in a pass.
        shown: number of a group ▶ earlier layers whose outputs are to be shown beside its inputs.
    """
    recorder = Recorder([*given, *parameters])
    cuts: list[Cut] = []
    outputs: dict[int, int] = {}

    def reads(number: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            if recorder.refused is not None:
                raise StopForward
            if number == len(cuts):
                try:
                    slots = (recorder.slot(args[0]), *(outputs[id(m)] for m in shown.get(number, ())))
                except (Unrecordable, KeyError):
                    raise StopForward from None
                cuts.append(Cut(len(recorder.operations), slots))
            elif number > len(cuts):
                raise StopForward  # not the order that was asked for

        return hook

    def writes(module: Any, args: tuple[Any, ...], output: Any) -> None:
        with suppress(Unrecordable):
            outputs[id(module)] = recorder.slot(first_value(output))

    handles = [m.register_forward_pre_hook(reads(k)) for k, group in enumerate(groups) for m in group]
    handles += [m.register_forward_hook(writes) for m in {m for several in shown.values() for m in several}]
    output: int | None = None
    try:
        with torch.no_grad(), suppress(StopForward, Unrecordable), recorder, ValueReads(recorder):
            result = run()
            output = None if recorder.refused is not None else recorder.slot(result)
    finally:
        for handle in handles:
            handle.remove()
    if _reads_early(recorder, cuts, groups):
        output = None
    return Tape(recorder, len(given), cuts, output)


def _reads_early(recorder: Recorder, cuts: Sequence[Cut], groups: Sequence[Sequence[torch.nn.Module]]) -> bool:
    """Whether an operation in front of a group's cut reads the group's weights, so that it is to run again once they change."""
    for cut, group in zip(cuts, groups, strict=False):
        weights = {recorder.root(module.get_parameter("weight")) for module in group}
        before = recorder.operations[: cut.position]
        if any(recorder.roots[slot] in weights for one in before for slot in one.reads):
            return True
    return False
