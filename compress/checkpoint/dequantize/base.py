"""A scheme of quantised input: which tensors its arrays store, and how they become floats. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from compress.checkpoint.headers import TensorEntry
from compress.errors import CheckpointError
from compress.spec.spec import Quantized, Tensor

if TYPE_CHECKING:
    import torch

#: Function of an array's name: its bytes.
ReadArray: TypeAlias = Callable[[str], bytes]
#: Parts by role.
Parts: TypeAlias = Mapping[str, "torch.Tensor"]
#: Value of ``quant_method`` ▶ scheme.
SCHEMES: dict[str, Scheme] = {}
#: Elements that are dequantised at a time, which bounds the memory of intermediate floats.
AT_ONCE = 1 << 20


@dataclass(frozen=True)
class WeightFiles:
    """Parts of a checkpoint's weight files, and the tensors recognised so far.

    Attributes:
        config: of the model. quantization: its ``quantization_config``.
        entries: headers' entries by name. read: reads a small array.
        dtype: safetensors dtype of dequantised tensors.
        where: for errors.
        tensors, sources: recognised tensors.
    """

    config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    read: ReadArray
    dtype: str
    where: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, Quantized] = field(default_factory=dict)

    def named(self, end: str) -> Iterable[tuple[str, TensorEntry]]:
        """Parts whose names end so: (name without the end, entry)."""
        return ((key.removesuffix(end), entry) for key, entry in self.entries.items() if key.endswith(end))

    def entry(self, key: str, of: str, dtypes: Iterable[str], shapes: Iterable[tuple[int, ...]] = ()) -> TensorEntry:
        """Entry of an array that the tensor ``of`` needs, with one of these dtypes and, if any are given, shapes.

        Raises:
            CheckpointError: it is missing, or is another array.
        """
        entry = self.entries.get(key)
        if entry is None:
            raise CheckpointError(f"has {of}, but not {key}, which its values need", where=self.where)
        if entry.dtype not in dtypes:
            raise CheckpointError(f"array {key} is {entry.dtype}, not {' or '.join(dtypes)}", where=self.where)
        if shapes and entry.shape not in shapes:
            raise CheckpointError(
                f"array {key} has the shape {list(entry.shape)}, and {of} needs "
                + " or ".join(str(list(shape)) for shape in shapes),
                where=self.where,
            )
        return entry

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        said: str,
        arrays: Mapping[str, str],
        decode: Callable[..., torch.Tensor],
    ) -> None:
        """Add a tensor with its source. ``said``: the format in words."""
        if name in self.tensors or (name in self.entries and name not in arrays.values()):
            raise CheckpointError(f"has {name} twice: as floats and as {said}", where=self.where)
        size = sum(self.entries[key].end - self.entries[key].start for key in arrays.values())
        self.tensors[name] = Tensor(name, shape, self.dtype)
        self.sources[name] = Quantized(said, dict(arrays), size, decode)

    def unknown(self, key: str, value: Any, known: str) -> CheckpointError:
        """Error about a key of the ``quantization_config`` with a value that no decoder reads."""
        return CheckpointError(
            f"has `quantization_config.{key}`: {str(value)[:40]!r}, which this version cannot read",
            where=self.where,
            fix=f"it reads {known}; or start from the unquantised checkpoint",
        )


class Scheme(ABC):
    """Reads the arrays of one kind of ``quant_method``. A subclass with ``methods`` registers itself.

    Attributes:
        methods: values of ``quant_method``.
        unused: name ends of arrays that only kernels need; they are left out with a note.
        marks: name ends of arrays of codes and scales, each of which must belong to a tensor.
        coded: dtypes of arrays that are no values without scales.
    """

    methods: ClassVar[tuple[str, ...]]
    unused: ClassVar[tuple[str, ...]] = ()
    marks: ClassVar[tuple[str, ...]] = ()
    coded: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        SCHEMES.update(dict.fromkeys(cls.methods, cls()))

    @abstractmethod
    def find(self, files: WeightFiles) -> None:
        """Add the tensors of the scheme to ``files``. Raises `CheckpointError` for missing or wrong arrays."""


def fill(out: torch.Tensor, values: Callable[[slice], torch.Tensor], step: int = 1) -> torch.Tensor:
    """``out`` [R, …], filled with float values of some rows at a time, which bounds the memory of intermediate arrays.

    Args:
        values: function from a slice of rows, a multiple of ``step`` of them except at the end, to their values.
    """
    count = max(1, AT_ONCE // max(1, prod(out.shape[1:])) // step) * step
    for start in range(0, out.shape[0], count):
        rows = slice(start, min(start + count, out.shape[0]))
        out[rows] = values(rows)
    return out


def check_finite(scale: torch.Tensor, what: str = "scales") -> None:
    """Raise ValueError where a scale is NaN or infinite."""
    if scale.is_floating_point() and not bool(scale.float().isfinite().all()):
        raise ValueError(f"its {what} are NaN or infinite: the checkpoint is damaged")


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; takes no memory beside the values."""
    import torch

    return not values.numel() or all(bool(x.isfinite()) for x in torch.aminmax(values))  # both are NaN if a value is
