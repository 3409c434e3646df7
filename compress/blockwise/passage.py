"""One pass of all samples through a block that stops in front of each group of matrices, so that the group can be changed.

Where a block's operations can be recorded (`compress.blockwise.tape`), each operation runs once for each sample: what is live
at a stop waits in a file. Where they cannot (experts), the pass to each stop starts anew in front of the block. Both give the
same values.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from compress.blockwise.activations import Activations
from compress.blockwise.arguments import Call
from compress.blockwise.block import Block, BlockView
from compress.blockwise.device_room import DeviceRoom
from compress.blockwise.experts import unfused
from compress.blockwise.linears import TargetLinear, first_value
from compress.blockwise.streamed import StopForward
from compress.blockwise.tape import Tape, record

#: Tapes of one block, for calls of different shapes; samples beyond that start anew at each stop.
_MOST_TAPES = 8


class TensorPlace(NamedTuple):
    """A tensor within the storages of a batch: number of the storage, dtype, and its place there."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


#: Bytes of a storage on the device, or their offset and number in a file.
StoragePlace: TypeAlias = "torch.Tensor | tuple[int, int]"


class WaitingValues:
    """Live values of each batch at a stop, in two nameless files that take turns; the system removes them with the process.

    Args:
        folder: of new files. spare: files to use again, since memory that the system has for them already is quicker to write;
            `close` puts them there.
        room: in the device's memory, where values wait while there is some.
    """

    def __init__(self, folder: Path, device: str, spare: list[IO[bytes]], room: DeviceRoom) -> None:
        self._device, self._spare, self._room = device, spare, room
        self._read, self._written = (
            spare.pop() if spare else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            for _ in range(2)
        )
        self._before: dict[int, tuple[list[StoragePlace], dict[int, TensorPlace]]] = {}
        self._after: dict[int, tuple[list[StoragePlace], dict[int, TensorPlace]]] = {}
        self._end = 0

    def turn(self) -> None:
        """Make readable what was written, and overwrite what was read."""
        self._read, self._written = self._written, self._read
        self._free(self._before)
        self._before, self._after, self._end = self._after, {}, 0

    def write(self, batch: int, values: Mapping[int, torch.Tensor]) -> None:
        """Write a batch's values, by slot; what shares memory still does when it is read."""
        storages: dict[int, int] = {}
        places: list[StoragePlace] = []
        layouts = {}
        for slot, value in values.items():
            value = value.resolve_conj().resolve_neg()  # what a view says of itself is not in the file
            storage = value.untyped_storage()
            number = storages.setdefault(storage._cdata, len(places))
            if number == len(places):
                places.append(self._keep(torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)))
            layouts[slot] = TensorPlace(
                number, value.dtype, tuple(value.shape), tuple(value.stride()), int(value.storage_offset())
            )
        self._after[batch] = places, layouts

    def _keep(self, data: torch.Tensor) -> StoragePlace:
        """Where bytes wait: held on the device, or their place in the file."""
        if self._room.take(len(data)):
            return data.clone()
        place = self._end, len(data)
        self._end += _put(self._written.fileno(), data.cpu(), self._end)
        return place

    def _free(self, batches: Mapping[int, tuple[list[StoragePlace], Any]]) -> None:
        for places, _ in batches.values():
            self._room.give(sum(len(place) for place in places if isinstance(place, torch.Tensor)))

    def read(self, batch: int, slots: Collection[int] | None = None) -> dict[int, torch.Tensor]:
        """A batch's values by slot: all, or some."""
        places, layouts = self._before[batch]
        wanted = {slot: one for slot, one in layouts.items() if slots is None or slot in slots}
        storages = {number: self._storage(places[number]) for number in {one.storage for one in wanted.values()}}
        return {slot: _tensor(storages[one.storage], one, self._device) for slot, one in wanted.items()}

    def _storage(self, place: StoragePlace) -> Any:
        if isinstance(place, torch.Tensor):
            return place.clone().untyped_storage()
        offset, count = place
        data = torch.empty(count, dtype=torch.uint8)
        view = memoryview(data.numpy().data)
        while view:
            step = os.preadv(self._read.fileno(), [view], offset)
            assert step
            view, offset = view[step:], offset + step
        return data.to(self._device).untyped_storage()

    def close(self) -> None:
        """Hand back the files and the room."""
        self._spare += [self._read, self._written]
        for batches in (self._before, self._after):
            self._free(batches)
            batches.clear()


def _put(file: int, data: torch.Tensor, offset: int) -> int:
    view = memoryview(data.numpy().data)
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count
    return data.numel()


def _tensor(storage: Any, layout: TensorPlace, device: str) -> torch.Tensor:
    tensor = torch.empty(0, dtype=layout.dtype, device=device)
    return tensor.set_(storage, layout.offset, layout.size, layout.stride)


class _Known(NamedTuple):
    tape: Tape
    given: list[tuple[Any, ...]]  # of each tensor that the block is given: shape and the like
    others: tuple[list[Any], TreeSpec]  # its other arguments, and how all are nested


class Passage:
    """Samples on their way through a block, from group to group.

    Args:
        groups: in the order in which they read; each reads every token once.
        shown: number of a group ▶ earlier linears whose outputs are shown beside its inputs.
        inputs: hidden states in front of the block. original: for `Block.forward_original`.
        tapes: of another passage through the same block as it is now. taped: False if each stop is to start anew.
    """

    def __init__(
        self,
        block: Block,
        groups: Sequence[Sequence[TargetLinear]],
        shown: Mapping[int, Sequence[TargetLinear]],
        *,
        inputs: Activations | None = None,
        original: bool = False,
        tapes: list[_Known] | None = None,
        taped: bool = True,
    ) -> None:
        self._block, self._groups = block, [[s.module for s in group] for group in groups]
        self._widths = [group[0].weight.shape[1] for group in groups]
        self._shown = {number: [s.module for s in several] for number, several in shown.items()}
        self._inputs = inputs or block.inputs
        self._view: BlockView = (block.original_view if original else None) or block.view
        self._batches = list(self._view.batches())
        self._tapes: list[_Known] = [] if tapes is None else tapes
        self._of: list[Tape | None] = [] if taped else [None] * len(self._batches)
        self._waiting = WaitingValues(self._inputs.path.parent, self._view.device, self._view.spare, self._view.room)
        self._sealed: bytes | None = None

    @property
    def tapes(self) -> list[_Known]:
        """The block's tapes."""
        return self._tapes

    def reach(self) -> int:
        """Number of stops that the first batch's tape comes to; the block must be as it came."""
        if not self._of and self._batches:
            self._of.append(self._tape(*self._beginning(self._batches[0])))
        return self._of[0].reach if self._of and self._of[0] is not None else 0

    def advance(self, number: int) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
        """Bring all samples from stop ``number`` - 1 to stop ``number``.

        Yield the numbers of a batch's samples, and the inputs of the group with the outputs of the earlier linears to show.
        """
        for batch, rows in enumerate(self._batches):
            hidden, call = self._beginning(rows)
            shown = self._step(number, batch, hidden, call)
            yield rows, self._anew(number, hidden, call) if shown is None else shown
        self._waiting.turn()

    def bring(self, number: int) -> None:
        """The same without a look at the tensors; see `waiting`."""
        for batch, rows in enumerate(self._batches):
            self._step(number, batch, *self._beginning(rows))
        self._waiting.turn()

    def _beginning(self, rows: Sequence[int]) -> tuple[torch.Tensor, Call]:
        """Hidden states of samples in front of the block, and its other arguments."""
        return self._inputs.read(rows).to(self._view.device), self._view.arguments(self._block.index, rows)

    def _step(self, number: int, batch: int, hidden: torch.Tensor, call: Call) -> list[torch.Tensor] | None:
        """Bring one batch to a stop by its tape, and return what is shown there; None where no tape comes so far."""
        if len(self._of) == batch:
            self._of.append(self._tape(hidden, call))
        if self.starts_anew(number, batch):
            return None
        tape, given = self._of[batch], [hidden, *_tensors(call)]
        assert tape is not None
        state = tape.run(number, given, self._waiting.read(batch) if number else {})
        self._waiting.write(batch, state)
        return tape.shown(number, given, state)

    def starts_anew(self, number: int, batch: int) -> bool:
        """Whether a batch's tape does not come to a stop, so that each look at it is a pass of its own."""
        tape = self._of[batch]
        return tape is None or number >= tape.reach

    def waiting(self, number: int, batch: int) -> list[torch.Tensor]:
        """The tensors that `advance` has yielded of a batch for stop ``number``, the last one that it came to."""
        tape, (hidden, call) = self._of[batch], self._beginning(self._batches[batch])
        if tape is None or self.starts_anew(number, batch):
            return self._anew(number, hidden, call)
        return tape.shown(number, [hidden, *_tensors(call)], self._waiting.read(batch, tape.slots_shown(number)))

    def outputs(self) -> Iterator[tuple[list[int], torch.Tensor]]:
        """The block's outputs, by batch; to be called once, after the last stop."""
        for batch, rows in enumerate(self._batches):
            tape, (hidden, call) = self._of[batch], self._beginning(rows)
            if tape is None or not tape.complete:
                yield rows, self._run(hidden, call)
                continue
            given = [hidden, *_tensors(call)]
            yield rows, tape.output(given, tape.run(tape.reach, given, self._waiting.read(batch)))
        self.close()

    def close(self) -> None:
        """Hand back the files."""
        self._waiting.close()

    # ---- weights ----

    def seal(self) -> None:
        """Remember the block's weights: no group changes any more."""
        self._sealed = _weights(self._block.module)

    def holds(self) -> bool:
        """Whether the weights are those that `seal` saw, so that `outputs` are those of the block."""
        return self._sealed is not None and self._sealed == _weights(self._block.module)

    # ---- tapes ----

    def _tape(self, hidden: torch.Tensor, call: Call) -> Tape | None:
        """The tape for a call of the block as it came; None where there are too many of them."""
        given, others = _signature([hidden, *_tensors(call)]), _others(call)
        for known in self._tapes:
            if known.given == given and _same(known.others, others):
                self._prove(known.tape, hidden, call)
                return known.tape
        if len(self._tapes) == _MOST_TAPES:
            return None
        module = self._block.module
        with unfused(self._block.swaps):
            tape = record(
                lambda: self._run(hidden, call),
                [hidden, *_tensors(call)],
                [*module.parameters(), *module.buffers()],
                self._groups,
                self._shown,
            )
        self._tapes.append(_Known(tape, given, others))
        return tape

    def _prove(self, tape: Tape, hidden: torch.Tensor, call: Call) -> None:
        """Compare a tape with the block on other samples than it was recorded on, unless one like it has been compared."""
        if not tape.reach or (text := tape.text()) in self._view.proven:
            return
        given = [hidden, *_tensors(call)]
        state: dict[int, torch.Tensor] = {}
        wanted = [self._anew(number, hidden, call) for number in range(tape.reach)]
        output = self._run(hidden, call) if tape.complete else None
        for number, tensors in enumerate(wanted):
            state = tape.run(number, given, state)
            if not all(torch.equal(a, b) for a, b in zip(tensors, tape.shown(number, given, state), strict=True)):
                tape.stop_at(number)
                return
        if output is not None and not torch.equal(output, tape.output(given, tape.run(tape.reach, given, state))):
            tape.stop_at(tape.reach)
            return
        self._view.proven.add(text)

    # ---- without a tape ----

    def _run(self, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        with torch.no_grad():
            return self._view.run(self._block.index, self._block.module, hidden, call)

    def _anew(self, number: int, hidden: torch.Tensor, call: Call) -> list[torch.Tensor]:
        """Inputs of a group, and what is shown beside them, from the block's beginning."""
        read: list[torch.Tensor] = []
        outputs: dict[torch.nn.Module, torch.Tensor] = {}

        def stop(module: Any, args: tuple[Any, ...]) -> None:
            read.append(args[0])
            raise StopForward

        def keep(module: Any, args: tuple[Any, ...], output: Any) -> None:
            outputs[module] = first_value(output)

        beside = self._shown.get(number, [])
        handles = [module.register_forward_pre_hook(stop) for module in self._groups[number]]
        handles += [module.register_forward_hook(keep) for module in beside]
        try:
            with unfused(self._block.swaps), suppress(StopForward):
                self._run(hidden, call)
        finally:
            for handle in handles:
                handle.remove()
        if not read:  # an expert without tokens
            read.append(hidden.new_zeros(0, self._widths[number]))
        return [read[0], *(outputs[module] for module in beside)]


def _weights(module: Any) -> bytes:
    """Digest of a block's parameters."""
    digest = sha256()
    for parameter in module.parameters():
        data = parameter.data.contiguous().view(-1).view(torch.uint8)
        digest.update(memoryview(data.cpu().numpy().data))
    return digest.digest()


def _tensors(call: Call) -> list[torch.Tensor]:
    """The tensors among a call's arguments, in a fixed order."""
    return [x for x in tree_leaves(call) if isinstance(x, torch.Tensor)]


def _others(call: Call) -> tuple[list[Any], TreeSpec]:
    """The other arguments, with None in the tensors' places, and how all are nested."""
    leaves, shape = tree_flatten(call)
    return [None if isinstance(x, torch.Tensor) else x for x in leaves], shape


def _signature(tensors: Sequence[torch.Tensor]) -> list[tuple[Any, ...]]:
    """Shape, strides and dtype of each tensor, and which one it is the same as."""
    first: dict[int, int] = {}
    return [
        (tuple(x.shape), tuple(x.stride()), x.dtype, first.setdefault(id(x), number))
        for number, x in enumerate(tensors)
    ]


def _same(a: tuple[list[Any], TreeSpec], b: tuple[list[Any], TreeSpec]) -> bool:
    """Whether arguments that are no tensors are equal; objects must be identical."""
    plain = (int, float, bool, str, torch.dtype, torch.device)
    return a[1] == b[1] and all(
        x is y or (isinstance(x, plain) and type(x) is type(y) and x == y) for x, y in zip(a[0], b[0], strict=True)
    )
