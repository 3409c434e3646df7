"""Hub ids: headers by range requests, files into the hub cache. Local folders never get here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from compress.checkpoint.files import (
    ReadBytes,
    SameBytes,
    TwoModels,
    check_copies,
    indexed_files,
    read_bytes,
    read_json,
    same_bytes,
    samples,
    unread_note,
    weight_headers,
)
from compress.checkpoint.headers import Header, TensorEntry
from compress.checkpoint.layout import INDEX_NAME, SINGLE_NAME
from compress.errors import CheckpointError

_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?$")
#: Files that are not downloaded: weights in other formats.
_IGNORED = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
    "*.ot",
    "onnx/*",
    "openvino/*",
    "coreml/*",
]
T = TypeVar("T")


def is_hub_id(reference: str) -> bool:
    """Whether a reference can be a hub id: ``name`` or ``org/name``, optionally with ``@revision``.

    ``folder/name`` is a path if ``folder`` exists here. The caller has checked that the reference is not a local folder.
    """
    return _ID.fullmatch(reference) is not None and not ("/" in reference and Path(reference.split("/")[0]).is_dir())


def _parts(reference: str) -> tuple[str, str]:
    """Repository and revision, which may be empty. Raises `CheckpointError` for a name that the hub does not allow."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    repo, _, revision = reference.partition("@")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise CheckpointError(
            "is neither a folder here nor a valid hub id", where=reference, fix="check the name"
        ) from None
    return repo, revision


def download(reference: str, *, offline: bool = False) -> Path:
    """Folder of the snapshot in the hub cache; downloaded if it is not there yet."""
    import huggingface_hub

    repo, revision = _parts(reference)
    return Path(
        _call(
            reference,
            lambda: huggingface_hub.snapshot_download(
                repo, revision=revision or None, ignore_patterns=_IGNORED, local_files_only=_offline(offline)
            ),
        )
    )


def read_headers(
    reference: str, *, offline: bool = False
) -> tuple[Any, dict[str, Header], SameBytes, ReadBytes, tuple[str, ...]]:
    """Config, weight headers, a comparison and a reader of byte ranges, and notes.

    Files that are not in the cache are read by range requests of a few kB; byte ranges are then compared by samples.

    Raises:
        TwoModels: as `files.weight_headers`; values of tensors are not compared.
    """
    import huggingface_hub

    repo, revision = _parts(reference)
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision or None, local_files_only=True))
        headers, notes = weight_headers(folder)
        return read_json(folder, "config.json"), headers, same_bytes(folder), read_bytes(folder), notes
    except TwoModels:
        raise
    except (CheckpointError, huggingface_hub.errors.LocalEntryNotFoundError):
        if _offline(offline):
            raise CheckpointError(
                "is not in the local cache", where=reference, fix="download it first, or leave out --offline"
            ) from None
    config = _call(reference, lambda: huggingface_hub.hf_hub_download(repo, "config.json", revision=revision or None))
    remote = _call(reference, lambda: huggingface_hub.get_safetensors_metadata(repo, revision=revision or None))
    headers = {file: _header(info) for file, info in remote.files_metadata.items()}
    notes = () if remote.sharded else _beside(reference, headers[SINGLE_NAME])
    read = _reader(reference)
    return read_json(Path(config).parent, "config.json"), headers, _same(read), read, notes


def _reader(reference: str) -> ReadBytes:
    """Reader of data of a repository's files. Offsets count from the end of a header."""
    import huggingface_hub

    utils: Any = huggingface_hub.utils
    repo, _, revision = reference.partition("@")

    def read(file: str, start: int, count: int) -> bytes:
        url = huggingface_hub.hf_hub_url(repo, file, revision=revision or None)
        asked = {**utils.build_hf_headers(), "range": f"bytes={start}-{start + count - 1}"}

        def ask() -> bytes:
            response = utils.get_session().get(url, headers=asked, follow_redirects=True)
            utils.hf_raise_for_status(response)
            return bytes(response.content[:count])

        return _call(reference, ask)

    begins = cache(lambda file: 8 + int.from_bytes(read(file, 0, 8), "little"))
    return lambda place, size: read(place[0], begins(place[0]) + place[1], size)


def _same(read: ReadBytes) -> SameBytes:
    """Sampled comparison of byte ranges."""

    def same(a: tuple[str, int], b: tuple[str, int], size: int) -> bool:
        return all(
            read((a[0], a[1] + start), count) == read((b[0], b[1] + start), count)
            for start, count in samples(size)
            if count
        )

    return same


def _header(info: Any) -> Header:
    """Header as the hub's client has read it."""
    entries = {name: TensorEntry(t.dtype, tuple(t.shape), *t.data_offsets) for name, t in info.tensors.items()}
    return Header(entries, dict(info.metadata or {}), 0)


def _beside(reference: str, single: Header) -> tuple[str, ...]:
    """Notes on an index beside the single file of a repository, like those of `files.weight_headers`."""
    import huggingface_hub

    repo, _, tag = reference.partition("@")
    revision = tag or None
    there = set(_call(reference, lambda: huggingface_hub.list_repo_files(repo, revision=revision)))
    if INDEX_NAME not in there:
        return ()
    index = Path(_call(reference, lambda: huggingface_hub.hf_hub_download(repo, INDEX_NAME, revision=revision)))
    try:
        files = {*(indexed_files(read_json(index.parent, INDEX_NAME)) or {}).values()}
    except CheckpointError:
        files = set()
    if files <= {SINGLE_NAME} or not files <= there:
        return (unread_note(),)

    def shard(file: str) -> Header:
        return (
            single
            if file == SINGLE_NAME
            else _header(
                _call(reference, lambda: huggingface_hub.parse_safetensors_file_metadata(repo, file, revision=revision))
            )
        )

    return (check_copies(single, {file: shard(file) for file in sorted(files)}, reference),)


def _offline(offline: bool) -> bool:
    return offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def _call(reference: str, work: Callable[[], T]) -> T:
    """Result of a hub call. Its errors become a `CheckpointError` of one line."""
    import huggingface_hub.errors as hub

    try:
        return work()
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError):
        raise CheckpointError(
            "is neither a folder here nor a hub repository that you can read", where=reference
        ) from None
    except hub.NotASafetensorsRepoError:
        raise CheckpointError(
            "has no safetensors weights", where=reference, fix="convert it to safetensors first"
        ) from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        raise CheckpointError(
            "is not in the local cache and the hub cannot be reached",
            where=reference,
            fix="check the name, the network, or --offline",
        ) from None
    except (hub.HfHubHTTPError, OSError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"cannot be read from the hub: {text}", where=reference) from error
