"""Token ids that are given: as a tensor, or in ``.npy`` and ``.safetensors`` files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint.headers import read_header
from compress.data.batches import Batches
from compress.data.kinds import FIELD
from compress.errors import DataError, one_line

if TYPE_CHECKING:
    import torch


def read_ids(file: str | Path, field: str = FIELD) -> Batches:
    """Read token ids from a ``.npy`` or ``.safetensors`` file: integers [samples, length].

    Args:
        field: the tensor to read from a ``.safetensors`` file; with the default, a file's only tensor may have any name.

    Raises:
        DataError: the file is missing, empty, damaged, lacks the tensor, or holds anything but integers [samples, length].
    """
    path = Path(file)
    try:
        if not path.stat().st_size:
            raise DataError("is empty", where=str(path))
        read = _npy(path) if path.suffix.lower() == ".npy" else _safetensors(path, field)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise DataError(reason, where=str(path)) from None
    return given_ids(read, str(path))


def _npy(path: Path) -> torch.Tensor:
    import numpy
    import torch

    try:
        with path.open("rb") as file:  # numpy.load would take what is not an array for a pickle
            array = numpy.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise DataError(f"is not an array: {one_line(error)}", where=str(path)) from None
    if array.dtype.kind not in "iu":
        raise DataError(f"holds {array.dtype.name}, not token ids", where=str(path), fix=_FIX)
    return torch.from_numpy(array.astype(numpy.int64))


def _safetensors(path: Path, field: str) -> torch.Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(_tensor_of(sorted(file.keys()), field, path))
    except SafetensorError as error:
        raise DataError(f"is damaged: {one_line(error)}", where=str(path)) from None
    return tensor


def _tensor_of(names: Sequence[str], field: str, path: Path) -> str:
    """The name of the tensor to read; see `read_ids`. Raises `DataError`."""
    name = names[0] if field == FIELD and len(names) == 1 else field
    if name not in names:
        raise DataError(
            f"has no tensor `{name}`",
            where=str(path),
            fix=f"set `field` to one of: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}",
        )
    return name


_FIX = "save integers [samples, length]"


def given_ids(ids: torch.Tensor, where: str = "data") -> Batches:
    """Samples of given token ids, unchanged.

    Args:
        ids: integers [samples, length]. where: names them in errors; its last part names the samples.

    Raises:
        DataError: they are not integers, or not of two dimensions, or empty.
    """
    import torch

    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise DataError(f"holds {str(ids.dtype).removeprefix('torch.')}, not token ids", where=where, fix=_FIX)
    check_shape(ids.shape, where)
    name = Path(where).name
    return Batches(ids.detach().to("cpu", torch.int64), chosen=tuple(f"{name}#{row}" for row in range(len(ids))))


def check_shape(shape: Sequence[int], where: str) -> None:
    """Raise `DataError` where a shape is not [samples, length], or holds no token."""
    if len(shape) != 2:
        raise DataError(f"has the shape {list(shape)}, which is not [samples, length]", where=where, fix=_FIX)
    if not shape[0] * shape[1]:
        raise DataError(f"holds no token: its shape is {list(shape)}", where=where)


def ids_in(file: str, field: str) -> tuple[int, ...]:
    """Shape of the token ids of a ``.npy`` or ``.safetensors`` file, by its header alone.

    Raises:
        DataError: as `read_ids`, as far as the header tells. CheckpointError: a damaged ``.safetensors`` file.
    """
    path = Path(file)
    if path.suffix.lower() == ".npy":
        kind, shape = _npy_header(path)
        if kind[-2:-1] not in ("i", "u"):
            raise DataError(f"holds {kind}, not token ids", where=file, fix=_FIX)
        return shape
    entries = read_header(path).entries
    entry = entries[_tensor_of(sorted(entries), field, path)]
    if not entry.dtype.startswith(("I", "U")):
        raise DataError(f"holds {entry.dtype}, not token ids", where=file, fix=_FIX)
    return entry.shape


def _npy_header(path: Path) -> tuple[str, tuple[int, ...]]:
    """The type, such as ``<i4``, and the shape of an array: numpy's format 1 to 3."""
    import ast

    try:
        with path.open("rb") as file:
            start = file.read(8)
            size = int.from_bytes(file.read(2 if start[6:7] == b"\1" else 4), "little")
            header = ast.literal_eval(file.read(min(size, 1 << 16)).decode("latin-1").strip())
        kind, shape = str(header["descr"]), tuple(int(size) for size in header["shape"])
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        raise DataError("is not an array: its header cannot be read", where=str(path)) from None
    return kind, shape
