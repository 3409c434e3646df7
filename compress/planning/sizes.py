"""Sizes of checkpoints, from their headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.architectures.cache import CachedBytes, cached_bytes, kv_bytes_per_token
from compress.architectures.model_map import model_map
from compress.checkpoint.edits import first_without_twin
from compress.checkpoint.edits.twin import dense_spec
from compress.checkpoint.layout import Layout, lay_out
from compress.checkpoint.sidecars import safe_file
from compress.checkpoint.store import Store, with_storage
from compress.spec.spec import DTYPE_BITS, FLOAT_DTYPES, Spec

if TYPE_CHECKING:
    from compress.checkpoint.open import Stored


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a checkpoint.

    Attributes:
        bytes: size of all weight files. parameters: number of float elements; shared ones count once.
        kept_parameters: parameters that no keep-mask removes.
        active_parameters: parameters used for one token; of experts, only those it is sent to.
        bits_per_weight: stored bits of data per parameter.
        kv_bytes_per_token: bytes that decoding caches per token while no window is full, in the format that the config names;
            None without a record or without a cache.
        cache: parts of that cache with the tokens that each keeps; None where it is not known.
        load_bytes: memory of the weights after a stock load, which holds all floats in ``config.dtype``.
        tensors: number of tensors with bytes of their own.
    """

    bytes: int
    parameters: int
    kept_parameters: int
    active_parameters: int
    bits_per_weight: float
    kv_bytes_per_token: int | None
    cache: list[CachedBytes] | None
    load_bytes: int
    tensors: int


def size_of(spec: Spec, layout: Layout) -> Size:
    """The size of a checkpoint with that layout of its weight files."""
    config = spec.structure.config
    stored = list(spec.stored())
    data = sum(e.end - e.start for shard in layout.shards for e in shard.entries.values())
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    bits = next((DTYPE_BITS[k] for k, v in FLOAT_DTYPES.items() if v == dtype), 32)
    return Size(
        bytes=layout.bytes,
        parameters=spec.parameters,
        kept_parameters=spec.kept_parameters,
        active_parameters=model_map(spec).active_parameters,
        bits_per_weight=round(8 * data / max(spec.parameters, 1), 4),
        kv_bytes_per_token=kv_bytes_per_token(spec),
        cache=cached_bytes(spec),
        load_bytes=sum(t.count * bits // 8 if t.is_float else t.dense_bytes for t in stored),
        tensors=len(stored),
    )


def planned_size(spec: Spec, store: Store, max_shard: int, metadata: Mapping[str, str] | None = None) -> Size:
    """The size that the writer will give the spec in a store. In the stock store, edits are written as the dense twin."""
    if store == "stock" and spec.structure.edits:
        spec = dense_spec(spec)[0]
    spec = with_storage(spec, store)
    return size_of(spec, lay_out(spec, max_shard, metadata))


def size_in_other(spec: Spec, store: Store, max_shard: int, metadata: Mapping[str, str] | None) -> Size | None:
    """The size in the other store; None where stock files cannot hold the spec."""
    other = other_store(store)
    return None if other == "stock" and first_without_twin(spec) else planned_size(spec, other, max_shard, metadata)


def opened_size(spec: Spec, max_shard: int, metadata: Mapping[str, str] | None = None) -> Size:
    """The size of a checkpoint that was opened; of one that is dequantised on reading, the bytes and bits of its files."""
    size = size_of(spec, lay_out(spec, max_shard, metadata))
    if not spec.sources:
        return replace(size, bytes=size.bytes + spec.left_out)
    data = sum(t.dense_bytes if (s := spec.sources.get(t.name)) is None else s.bytes for t in spec.stored())
    return replace(size, bytes=spec.file_bytes, bits_per_weight=round(8 * data / max(spec.parameters, 1), 4))


def size_on_disk(checkpoint: Stored) -> Size:
    """The size of a checkpoint on disk; ``bytes`` is the size of its weight files as they are."""
    assert checkpoint.folder is not None
    size = opened_size(checkpoint.spec, 1 << 62, checkpoint.metadata)
    return replace(size, bytes=sum(safe_file(checkpoint.folder, name).stat().st_size for name in checkpoint.files))


def other_store(store: Store) -> Store:
    """The store that is not this one."""
    return "compact" if store == "stock" else "stock"
