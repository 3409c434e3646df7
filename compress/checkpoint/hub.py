"""Hub ids: headers by range requests, files into the usual cache. Nothing here runs for a local folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from compress.checkpoint.headers import Entry, Header
from compress.errors import CheckpointError

_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?$")
#: Everything but weights of other formats.
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
    """Whether a reference that is no local folder can be a hub id: ``name``, ``org/name``, with ``@revision`` or not.

    ``folder/name`` is a path where ``folder`` exists here.
    """
    return _ID.match(reference) is not None and not ("/" in reference and Path(reference.split("/")[0]).is_dir())


def download(reference: str, *, offline: bool = False) -> Path:
    """Folder of the snapshot in the hub cache, downloaded where it is not there yet."""
    import huggingface_hub

    repo, _, revision = reference.partition("@")
    return Path(
        _call(
            reference,
            lambda: huggingface_hub.snapshot_download(
                repo, revision=revision or None, ignore_patterns=_IGNORED, local_files_only=_offline(offline)
            ),
        )
    )


def read_headers(reference: str, *, offline: bool = False) -> tuple[Any, dict[str, Header]]:
    """Config and weight headers; of files that are not in the cache by range requests, a few kB each."""
    import huggingface_hub

    from compress.checkpoint.headers import read_header
    from compress.checkpoint.open import _weight_files, read_json

    repo, _, revision = reference.partition("@")
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision or None, local_files_only=True))
        return read_json(folder, "config.json"), {file: read_header(folder / file) for file in _weight_files(folder)}
    except (CheckpointError, huggingface_hub.errors.LocalEntryNotFoundError):
        if _offline(offline):
            raise CheckpointError(
                "is not in the local cache", where=reference, fix="download it first, or leave out --offline"
            ) from None
    config = _call(reference, lambda: huggingface_hub.hf_hub_download(repo, "config.json", revision=revision or None))
    remote = _call(reference, lambda: huggingface_hub.get_safetensors_metadata(repo, revision=revision or None))
    headers = {}
    for file, info in remote.files_metadata.items():
        entries = {name: Entry(t.dtype, tuple(t.shape), *t.data_offsets) for name, t in info.tensors.items()}
        headers[file] = Header(entries, dict(info.metadata or {}), 0)
    return read_json(Path(config).parent, "config.json"), headers


def _offline(offline: bool) -> bool:
    return offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def _call(reference: str, work: Callable[[], T]) -> T:
    """Run a hub call; whatever goes wrong there becomes one line."""
    import huggingface_hub.errors as hub

    try:
        return work()
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError):
        raise CheckpointError(
            "is neither a folder here nor a repository that the hub shows you", where=reference
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
