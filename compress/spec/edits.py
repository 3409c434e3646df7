"""Kinds of edits, by headers alone: the contract, and the table in which `compress.checkpoint.edits` registers its kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

from compress.spec.spec import DENSE, Edit, Spec, Tensor

#: Part of a block's cache: numbers per token, and most tokens kept. None for all; or a function from the text's length.
CachedPart: TypeAlias = tuple[int, int | Callable[[int], int] | None]
#: Kind of edit ▶ its description.
EDIT_KINDS: dict[str, EditKind] = {}


@dataclass(frozen=True, slots=True)
class TwinTensor:
    """A tensor of the dense twin.

    Attributes:
        tensor: its headers.
        sources: names of the tensors that it is computed from.
        compute: function of their values; None for a copy of the only one, with its keep-mask.
    """

    tensor: Tensor
    sources: tuple[str, ...]
    compute: Callable[..., Any] | None = None


class EditKind(ABC):
    """One kind of edit. A subclass with a ``kind`` registers itself; an `editing.ModelEdit` of that kind changes models.

    Attributes:
        kind: its name in ``config.json``.
        keys: the keys of its ``values``.
        storage: kind of tensors that it makes, by which passes accept a checkpoint: ``shared``, ``factored``, ``uneven``.
        label: plural noun for users, after a number.
        role: role of the matrices that it adds, see `architectures.model_map.Role`. adds: their modules below the edited one.
        spans_blocks: whether blocks depend on others, so that none can be removed.
        has_twin: whether a stock class can express the result, once computed.
        alone: without a twin: what the module has, and what to do for a stock checkpoint, for errors.
    """

    kind: ClassVar[str]
    keys: ClassVar[Collection[str]]
    storage: ClassVar[str]
    label: ClassVar[str]
    role: ClassVar[str] = "other"
    adds: ClassVar[tuple[str, ...]] = ()
    spans_blocks: ClassVar[bool] = False
    has_twin: ClassVar[bool] = True
    alone: ClassVar[tuple[str, str]] = ("", "")

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            assert cls.kind not in EDIT_KINDS, cls.kind
            EDIT_KINDS[cls.kind] = cls()

    def sound(self, values: Mapping[str, Any]) -> bool:
        """Whether values from a file have the right keys and types: integers from 1 up, ``transposed`` a boolean."""
        sizes = [value for key, value in values.items() if key != "transposed"]
        return (
            values.keys() == set(self.keys)
            and all(type(size) is int and size > 0 for size in sizes)
            and isinstance(values.get("transposed", False), bool)
        )

    @abstractmethod
    def check(self, edit: Edit, spec: Spec, where: str) -> None:
        """Check that the tensors fit the edit. Raises `CheckpointError`."""

    def cached(self, edit: Edit, parts: list[CachedPart]) -> list[CachedPart]:
        """Parts that the edited block caches.

        Args:
            parts: the same without the edit.
        """
        return parts

    def longest(self, edit: Edit) -> int | None:
        """Most tokens of a text that the edited module reads; None where the edit sets no limit."""
        return None

    def narrowed(self, edit: Edit, window: int) -> Edit:
        """The edit with attention windows of no more than so many tokens, for a check on a short text."""
        return edit

    def aliases(self, edit: Edit, spec: Spec) -> Mapping[str, Tensor]:
        """Name ▶ alias of the tensors that files leave out."""
        return {}

    def twin(self, edit: Edit, spec: Spec, tensor: Tensor) -> TwinTensor | None:
        """Tensor of the dense twin for a tensor of the edited module, or of one that the edit adds; None for none."""
        return copied(tensor)

    def untied(self, edits: Sequence[Edit], spec: Spec) -> Collection[str]:
        """Names of the aliases that are tensors of their own in the dense twin. ``edits``: all those of this kind."""
        return ()

    def twin_config(self, edits: Sequence[Edit]) -> Mapping[str, Any]:
        """Config keys that the dense twin has otherwise. ``edits``: all those of this kind."""
        return MappingProxyType({})


def copied(tensor: Tensor, name: str | None = None) -> TwinTensor:
    """The tensor, stored densely, under its name or another."""
    return TwinTensor(replace(tensor, name=name or tensor.name, quant_format=None, storage=DENSE), (tensor.name,))


def computed(
    tensor: Tensor, name: str, shape: tuple[int, ...], sources: tuple[str, ...], compute: Callable[..., Any]
) -> TwinTensor:
    """A tensor of another name and shape, in the dtype of ``tensor``, computed from several."""
    twin = replace(tensor, name=name, shape=shape, kept=None, quant_format=None, storage=DENSE)
    return TwinTensor(twin, sources, compute)
