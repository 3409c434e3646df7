"""The operations of a pass through a block, noted while they run.

A slot is the number of a tensor among those that were there before the pass or that an operation made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from compress.blockwise.streamed import StopForward


class Unrecordable(Exception):
    """An operation that a tape cannot hold, or a tensor of unknown origin."""


class Slot(NamedTuple):
    """Stands for a tensor among the arguments of an operation."""

    number: int


@dataclass
class Operation:
    """One call of a kernel.

    Attributes:
        leaves: its arguments, flat, with slots in place of tensors; shape: how they are nested.
        reads, makes, changes: slots. makes: in the order of its results, None for what is no tensor.
    """

    function: Any
    leaves: list[Any]
    shape: TreeSpec
    reads: list[int]
    makes: list[int | None] = field(default_factory=list)
    changes: list[int] = field(default_factory=list)

    def call(self, values: Mapping[int, torch.Tensor]) -> list[Any]:
        """Run it; its results, flat."""
        filled = [values[x.number] if type(x) is Slot else x for x in self.leaves]
        args, kwargs = tree_unflatten(filled, self.shape)
        return tree_leaves(self.function(*args, **kwargs))


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, notes the operations that run; stops the pass by `StopForward` at one that a tape cannot hold.

    Args:
        given: tensors that are there before the pass, by slot from 0 on.
    """

    def __init__(self, given: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = list(given)
        #: Numbers in the code, by slot.
        self.constants: dict[int, torch.Tensor] = {}
        self.operations: list[Operation] = []
        self.refused: str | None = None
        self._slots: dict[int, int] = {}
        for number, x in enumerate(given):  # a block may be given a buffer of its own, and another tensor the next time
            self._slots.setdefault(id(x), number)
        storages: dict[int, int] = {}
        #: The slot that first had a slot's memory, by slot.
        self.roots = [storages.setdefault(_memory(x), number) for number, x in enumerate(given)]

    def slot(self, tensor: torch.Tensor) -> int:
        """The slot of a tensor. Raises `Unrecordable` where no recorded operation made it."""
        if (number := self._slots.get(id(tensor))) is not None:
            return number
        owner, made = getattr(tensor, "_slot", (None, -1))
        if owner is not self:
            raise Unrecordable("a tensor from elsewhere")
        return int(made)

    def root(self, tensor: torch.Tensor) -> int | None:
        """The slot that first had the memory of a tensor that was there before; None of another one."""
        number = self._slots.get(id(tensor))
        return None if number is None else self.roots[number]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and note it."""
        kwargs = kwargs or {}
        if self.refused is not None:  # the code went on after the pass was stopped
            raise StopForward
        try:
            operation, memory = self._noted(func, args, kwargs)
        except (Unrecordable, NotImplementedError, RuntimeError) as error:
            self.refuse(f"{func}: {error}")
        result = func(*args, **kwargs)
        for one in tree_leaves(result):
            operation.makes.append(self._made(one, memory) if isinstance(one, torch.Tensor) else None)
        self.operations.append(operation)
        return result

    def refuse(self, reason: str) -> NoReturn:
        """Stop the pass, and note why."""
        self.refused = reason
        raise StopForward

    def _noted(self, func: Any, args: Any, kwargs: Any) -> tuple[Operation, dict[int, int]]:
        """An operation about to run, and the roots of its arguments by memory."""
        _require_repeatable(func, args, kwargs)
        leaves, shape = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        if func in (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default):
            self._keep(tensors[0])  # a number in the code
        slots = [Slot(self.slot(x)) if isinstance(x, torch.Tensor) else x for x in leaves]
        reads = [x.number for x in slots if type(x) is Slot]
        changes = []
        if func._schema.is_mutable:
            changes = [self.slot(x) for x in _written(func, args, kwargs)]
            if any(self._is_given(self.roots[slot]) for slot in changes):
                raise Unrecordable("changes what came from outside")
        memory = {_memory(x): self.roots[slot] for x, slot in zip(tensors, reads, strict=True)}
        return Operation(func, slots, shape, reads, changes=changes), memory

    def _keep(self, tensor: torch.Tensor) -> None:
        """Give a number in the code a slot among those of operations."""
        if id(tensor) not in self._slots:
            self._slots[id(tensor)] = len(self.roots)
            self.constants[len(self.roots)] = tensor
            self.roots.append(len(self.roots))

    def _is_given(self, slot: int) -> bool:
        return slot < len(self.given) or slot in self.constants

    def _made(self, tensor: Any, memory: dict[int, int]) -> int:
        """The slot of a result; ``memory`` has the roots of the operation's arguments and results."""
        with suppress(Unrecordable):
            return self.slot(tensor)  # an argument that was changed in place
        number = len(self.roots)
        tensor._slot = (self, number)
        self.roots.append(memory.setdefault(_memory(tensor), number))
        return number


class ValueReads(TorchFunctionMode):
    """Within, a pass stops where its code reads values of a tensor in a way that no operation shows, such as ``tolist``."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, or stop."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # new tensors from lists of others, and places to split at, are read without an operation
        given = tree_leaves((args[1:] if name in ("new_tensor", "tensor_split") else args, kwargs))
        if name in ("tolist", "numpy", "__array__", "__array_interface__") or (
            name in ("tensor", "as_tensor", "asarray", "new_tensor", "tensor_split")
            and any(isinstance(x, torch.Tensor) for x in given)
        ):
            self._recorder.refuse(f"{name}: depends on values")
        return func(*args, **kwargs)


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that an operation changes."""
    written = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written += [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
    return written


def _require_repeatable(func: Any, args: Any, kwargs: Any) -> None:
    """Raise `Unrecordable` for an operation whose shapes, or the code behind it, depend on values, or that draws numbers."""
    tags = func.tags
    numbers = func is torch.ops.aten.index.Tensor and all(
        x is None or x.dtype in (torch.int64, torch.int32) for x in args[1]
    )  # of a mask, the shape depends on values
    if torch.Tag.data_dependent_output in tags or (torch.Tag.dynamic_output_shape in tags and not numbers):
        raise Unrecordable("depends on values")
    if torch.Tag.nondeterministic_seeded in tags:
        names = [argument.name for argument in func._schema.arguments]
        place = names.index("dropout_p") if "dropout_p" in names else None
        dropout = None if place is None else (args[place] if place < len(args) else kwargs.get("dropout_p", 0.0))
        if dropout != 0:
            raise Unrecordable("draws random numbers")
