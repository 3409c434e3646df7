"""Writing checkpoints: streamed, verified, and visible only when complete."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from compress.checkpoint import bundle, edits
from compress.checkpoint.layout import INDEX_NAME, Layout, Shard, lay_out
from compress.checkpoint.older_keys import with_older_keys
from compress.checkpoint.open import COMPACT_TYPE, open_checkpoint
from compress.checkpoint.sidecars import copy_sidecars
from compress.checkpoint.storage import encode, parts
from compress.checkpoint.storage.bits import pack_bits
from compress.checkpoint.storage.compressed_tensors import write as compressed_tensors
from compress.checkpoint.store import Store, needs_code, stock_value, with_storage
from compress.checkpoint.values import Checkpoint, Value, torch_dtype
from compress.errors import CheckpointError, OutputError
from compress.files import temporary
from compress.progress import Progress, SilentProgress
from compress.spec.spec import FLOAT_DTYPES, Spec, Tensor

if TYPE_CHECKING:
    import torch

#: Default bytes of data per shard; the hub's usual size.
DEFAULT_MAX_SHARD = 5 * 10**9
_CHUNK = 1 << 24
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class Written:
    """Result of writing: spec with storage, bytes of the weight files, hash of all logical contents, seconds."""

    folder: Path
    spec: Spec
    bytes: int
    content: str
    write_seconds: float
    verify_seconds: float


def stored_form(
    spec: Spec, store: Store, max_shard: int, metadata: Mapping[str, str] | None = None
) -> tuple[Spec, Layout]:
    """Spec with its storage, and the layout of the files, exactly as `write_checkpoint` writes them."""
    spec = with_storage(spec, store)
    return spec, lay_out(spec, max_shard, metadata)


def write_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    store: Store = "stock",
    max_shard: int = DEFAULT_MAX_SHARD,
    extra_files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write ``checkpoint`` to ``folder``, which must not exist. The folder appears by a rename, complete and verified.

    Tensors are encoded and written one at a time, while the next one is read. Then every tensor is decoded from the written
    files, and the SHA-256 of its values or codes is compared with that of the input.

    Raises:
        OutputError: ``folder`` exists, or its parent cannot be written.
        ResourceError: the disk is full.
        CheckpointError: a tensor has NaN, or a tensor does not read back as written.
    """
    progress = progress or SilentProgress()
    if folder.exists():
        raise OutputError("exists already", where=str(folder))
    spec, layout = stored_form(checkpoint.spec, store, max_shard, checkpoint.metadata)
    with temporary(folder) as temp:
        start = time.perf_counter()
        hashes: dict[str, str] = {}
        with progress.task("writing", len(list(spec.stored()))) as task:
            for shard in layout.shards:
                _write_shard(temp / shard.file, shard, checkpoint, hashes, task)
        _write_small(temp, checkpoint, spec, layout, extra_files or {})
        _sync_folder(temp)
        written = time.perf_counter()
        with progress.task("verifying", len(hashes)) as task:
            read_back = open_checkpoint(temp, trust_remote_code=True)
            with closing(ahead(lambda name: (name, _digest(read_back.tensor(name))), hashes, 2)) as digests:
                for name, digest in digests:
                    if digest != hashes[name]:
                        raise CheckpointError(
                            f"tensor {name} does not read back as it was written",
                            where=str(folder),
                            fix="check the disk",
                        )
                    task.advance(note=name)
        verified = time.perf_counter()
        temp.rename(folder)
        _sync_folder(folder.parent)
    return Written(folder, spec, layout.bytes, _content(spec, hashes), written - start, verified - written)


def _write_shard(path: Path, shard: Shard, checkpoint: Checkpoint, hashes: dict[str, str], task: Any) -> None:
    with path.open("wb", buffering=0) as file:
        # reserve the space first, so a full disk fails before the work
        os.posix_fallocate(file.fileno(), 0, shard.bytes)
        _pwrite(file.fileno(), shard.header, 0)

        def read(tensor: Tensor) -> tuple[Tensor, Value, str]:
            value = stock_value(checkpoint.tensor(tensor.name), tensor)
            _check_value(tensor, value)
            return tensor, value, _digest(value)

        with closing(ahead(read, shard.tensors, 1)) as values:
            for tensor, value, digest in values:
                hashes[tensor.name] = digest
                for role, data in encode(value, tensor).items():
                    part = next(part for part in parts(tensor) if part.role == role)
                    assert tuple(data.shape) == part.shape, (part, data.shape)
                    _pwrite(file.fileno(), _raw(data), len(shard.header) + shard.entries[part.key].start)
                del value
                task.advance(note=tensor.name)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ahead(work: Callable[[A], B], items: Iterable[A], threads: int) -> Generator[B, None, None]:
    """Results of ``work`` in order. Up to ``threads`` further ones are computed while the caller uses one."""
    pool = ThreadPoolExecutor(threads)
    queue: deque[Future[B]] = deque()
    try:
        for item in items:
            queue.append(pool.submit(work, item))
            if len(queue) > threads:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check_value(tensor: Tensor, value: Value) -> None:
    """Check that the value has the planned shape and dtype, and no NaN."""
    import torch

    assert (value.mask is None) == (tensor.kept is None), tensor
    if value.codes is not None:
        assert tensor.quant_format is not None, tensor
        assert tuple(value.codes.codes.shape) == tensor.quant_format.rows(tensor.shape), (
            tensor,
            value.codes.codes.shape,
        )
        data = value.codes.scale.float()  # a NaN weight makes the scale of its group NaN
    else:
        data = value.data
        assert tuple(data.shape) == tensor.shape, (tensor, data.shape)
        assert data.dtype == torch_dtype(tensor.dtype), (tensor, data.dtype)
    if not tensor.count or tensor.dtype not in FLOAT_DTYPES:
        return
    # the minimum is NaN if any value is: one fast pass in the common case
    if torch.isnan(torch.aminmax(data).min) and (count := int(torch.isnan(data).sum())):
        raise CheckpointError(
            f"tensor {tensor.name} has {count} NaN values",
            fix="the checkpoint is damaged or its training diverged",
        )


def _raw(data: torch.Tensor) -> memoryview:
    import torch

    flat = data.contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def _pwrite(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view[:_CHUNK], offset)
        view, offset = view[count:], offset + count


def _digest(value: Value) -> str:
    """SHA-256 of the values in canonical form, or of their codes, and of the keep-mask if there is one."""
    codes = value.codes
    parts = (
        [value.data]
        if codes is None
        else [codes.codes, codes.scale, codes.zero, codes.overall, *codes.static_inputs.values()]
    )
    digest = hashlib.sha256()
    for part in parts:
        if part is not None:
            digest.update(_raw(part.cpu()))
    if value.mask is not None:
        digest.update(_raw(pack_bits(value.mask)))
    return digest.hexdigest()


def _content(spec: Spec, hashes: Mapping[str, str]) -> str:
    rows = [
        (n, spec.tensors[n].dtype, list(spec.tensors[n].shape), spec.tensors[n].kept, hashes[n]) for n in sorted(hashes)
    ]
    config = json.dumps(spec.structure.config, sort_keys=True) + (spec.structure.kv_cache or "")
    if spec.structure.edits:
        config += json.dumps(edits.to_json(spec.structure.edits), sort_keys=True)
    return hashlib.sha256((config + json.dumps(rows)).encode()).hexdigest()


def render_config(spec: Spec) -> bytes:
    """``config.json``: the stock config, also under older names of its fields, or the compact one that wraps it."""
    config = dict(spec.structure.config)
    if needs_code(spec):
        config = {
            "model_type": COMPACT_TYPE,
            "format": 1,
            "architectures": [bundle.CLASS_NAME],
            "auto_map": bundle.auto_map(spec.structure.class_name),
            "dtype": config.get("dtype", config.get("torch_dtype")),
            "edits": edits.to_json(spec.structure.edits),
            "base": {k: v for k, v in config.items() if k != "auto_map"},
        }
    else:
        config = with_older_keys(config)
        if (quantised := compressed_tensors.render(spec)) is not None:
            config[compressed_tensors.KEY] = quantised
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _write_small(
    temp: Path, checkpoint: Checkpoint, spec: Spec, layout: Layout, extra_files: Mapping[str, bytes]
) -> None:
    if checkpoint.folder is not None:
        copy_sidecars(checkpoint.folder, checkpoint.sidecars, temp)
    files = {**checkpoint.rewritten, "config.json": render_config(spec), **extra_files}
    if (index := layout.index()) is not None:
        files[INDEX_NAME] = index
    if needs_code(spec):
        files[bundle.FILE_NAME] = bundle.source()
    for name, data in files.items():
        (temp / name).write_bytes(data)
    for path in temp.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
