"""Weight files of a checkpoint folder, chosen as stock loaders choose them. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from compress.checkpoint.headers import Header, read_header
from compress.checkpoint.layout import INDEX_NAME, SINGLE_NAME
from compress.checkpoint.sidecars import safe_file
from compress.errors import CheckpointError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: Function of two places, each a file name and an offset, and a size: whether the bytes are equal.
SameBytes: TypeAlias = Callable[[tuple[str, int], tuple[str, int], int], bool]
#: Function of a place and a size: the bytes there.
ReadBytes: TypeAlias = Callable[[tuple[str, int], int], bytes]
#: Bytes that are compared at the beginning, in the middle and at the end of every tensor of two copies.
_SAMPLE = 4096
_AT_ONCE = 1 << 24


class TwoModels(CheckpointError):
    """A folder holds two different models."""


def read_json(folder: Path, name: str) -> Any:
    """Parsed JSON file of a checkpoint folder. Raises `CheckpointError`."""
    path = safe_file(folder, name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "name the folder of a checkpoint in Hugging Face layout" if name == "config.json" else None
        if (folder / "adapter_config.json").exists():
            hint = "this is a PEFT adapter: merge it into its base model first (merge_and_unload)"
        raise CheckpointError(f"has no {name}", where=str(folder), fix=hint) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}", where=str(path)) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error


def weight_headers(folder: Path) -> tuple[dict[str, Header], tuple[str, ...]]:
    """Headers of the weight files by name, in order, and notes for the user. Files must stay inside the folder.

    If both a single file and an index exist, the single file is read, as stock loaders do.

    Raises:
        TwoModels: the shards of the index are all there too, and hold another model.
        CheckpointError: there are no weights.
    """
    if (folder / SINGLE_NAME).exists() or (folder / SINGLE_NAME).is_symlink():
        single = read_header(safe_file(folder, SINGLE_NAME))
        notes = _beside(folder, single) if (folder / INDEX_NAME).exists() else ()
        return {SINGLE_NAME: single}, notes
    if (folder / INDEX_NAME).exists():
        return check_index(read_json(folder, INDEX_NAME), folder), ()
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES):
        raise CheckpointError(
            f"has its weights in a pickle ({pickles[0]}), which can run code when opened and is refused",
            where=str(folder),
            fix="convert it with: " + conversion_command(folder),
        )
    if others := sorted(p.name for p in folder.glob("*.safetensors")):
        raise CheckpointError(f"has {others[0]}, but no {SINGLE_NAME} and no {INDEX_NAME}", where=str(folder))
    raise CheckpointError(f"holds no weights: neither {SINGLE_NAME} nor {INDEX_NAME}", where=str(folder))


def conversion_command(folder: Path) -> str:
    """Command that converts a pickle checkpoint to safetensors with stock transformers."""
    return (
        'python -c "import json, transformers as t; '
        f"c = json.load(open('{folder}/config.json'))['architectures'][0]; "
        f"getattr(t, c).from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
    )


def indexed_files(index: Any) -> dict[str, str] | None:
    """Tensor name ▶ file of a shard index; None if it is not one."""
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
        return None
    return names


def check_index(index: Any, folder: Path) -> dict[str, Header]:
    """Headers of the shards of an index. Raises `CheckpointError` if shards and index disagree."""
    where = str(folder / INDEX_NAME)
    names = indexed_files(index)
    if names is None:
        raise CheckpointError("has no `weight_map` from tensor names to files", where=where)
    headers = {}
    for file in dict.fromkeys(names.values()):
        path = safe_file(folder, file)
        if not path.is_file():
            raise CheckpointError(
                f"names the file {file}, which is missing", where=where, fix="copy or download it again"
            )
        headers[file] = read_header(path)
    held = {key: file for file, header in headers.items() for key in header.entries}
    if lost := next((name for name, file in names.items() if held.get(name) != file), None):
        raise CheckpointError(f"puts tensor {lost} in {names[lost]}, which does not hold it", where=where)
    if extra := next((name for name in held if name not in names), None):
        raise CheckpointError(f"lacks tensor {extra} of {held[extra]}", where=where)
    return headers


def check_copies(single: Header, shards: Mapping[str, Header], where: str) -> str:
    """Note about a single file beside an index whose shards hold the same tensors.

    Raises:
        TwoModels: names, shapes or dtypes differ.
    """
    mine = {name: (entry.dtype, entry.shape) for name, entry in single.entries.items()}
    theirs = {name: (e.dtype, e.shape) for header in shards.values() for name, e in header.entries.items()}
    if mine != theirs:
        names = sorted(mine.keys() ^ theirs.keys()) or sorted(n for n in mine if mine[n] != theirs[n])
        raise _two_models(names[0], where)
    return f"{SINGLE_NAME} is read, as stock loaders do, not the shards of {INDEX_NAME} beside it"


def _beside(folder: Path, single: Header) -> tuple[str, ...]:
    """Notes on an index beside a single file; it is ignored if a shard is missing. Raises `TwoModels`."""
    try:
        names = indexed_files(read_json(folder, INDEX_NAME)) or {}
        shards = {file: read_header(safe_file(folder, file)) for file in dict.fromkeys(names.values())}
    except CheckpointError:
        shards = {}
    if not shards.keys() - {SINGLE_NAME}:
        return (unread_note(),)
    note, same = check_copies(single, shards, str(folder)), same_bytes(folder, sampled=True)
    for file, header in shards.items():
        for name, entry in header.entries.items():
            mine, theirs = single.data_start + single.entries[name].start, header.data_start + entry.start
            if not same((SINGLE_NAME, mine), (file, theirs), entry.end - entry.start):
                raise _two_models(name, str(folder))
    return (note,)


def unread_note() -> str:
    """Note about an index beside a single file whose shards are not there."""
    return f"{INDEX_NAME} is not read: {SINGLE_NAME} beside it holds the weights"


def _two_models(name: str, where: str) -> TwoModels:
    return TwoModels(
        f"holds two models: {SINGLE_NAME}, and other weights in the shards of {INDEX_NAME} ({name} differs)",
        where=where,
        fix="remove the one that you do not mean",
    )


def same_bytes(folder: Path, *, sampled: bool = False) -> SameBytes:
    """Comparison of byte ranges of a folder's files. ``sampled``: only their beginning, middle and end."""

    def same(a: tuple[str, int], b: tuple[str, int], size: int) -> bool:
        pieces = (
            samples(size) if sampled else ((start, min(_AT_ONCE, size - start)) for start in range(0, size, _AT_ONCE))
        )
        try:
            with (
                safe_file(folder, a[0]).open("rb", buffering=0) as first,
                safe_file(folder, b[0]).open("rb", buffering=0) as second,
            ):
                return all(
                    os.pread(first.fileno(), count, a[1] + start) == os.pread(second.fileno(), count, b[1] + start)
                    for start, count in pieces
                )
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=str(folder / a[0])) from error

    return same


def read_bytes(folder: Path) -> ReadBytes:
    """Reader of byte ranges of a folder's files."""

    def read(place: tuple[str, int], size: int) -> bytes:
        try:
            with safe_file(folder, place[0]).open("rb", buffering=0) as file:
                return os.pread(file.fileno(), size, place[1])
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=str(folder / place[0])) from error

    return read


def samples(size: int) -> list[tuple[int, int]]:
    """(start, count) of the pieces of a range of ``size`` bytes that a sampled comparison reads."""
    if size <= 3 * _SAMPLE:
        return [(0, size)]
    return [(0, _SAMPLE), ((size - _SAMPLE) // 2, _SAMPLE), (size - _SAMPLE, _SAMPLE)]
