"""Contents of a checkpoint. Reads only headers, unless zeros are to be counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.architectures.cache import cache_bytes, plan_lengths
from compress.architectures.description import describe, to_python
from compress.architectures.model_map import model_map
from compress.checkpoint.layout import natural
from compress.checkpoint.open import open_checkpoint, open_headers
from compress.checkpoint.storage import parts
from compress.checkpoint.store import needs_code
from compress.files import expanded
from compress.planning import opened_size, size_on_disk
from compress.spec.spec import Spec, Tensor


def storage_name(spec: Spec, tensor: Tensor) -> str:
    """The chain of codecs, with the number format of codes: ``mask ∘ int4``; for a tensor that is dequantised, its format."""
    if tensor.name in spec.sources:
        return spec.sources[tensor.name].format
    chain = tensor.storage if tensor.quant_format is None else (*tensor.storage[:-1], tensor.quant_format.format)
    return " ∘ ".join(chain)


def inspect(
    model: str | Path,
    *,
    zeros: bool = False,
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    offline: bool = False,
) -> dict[str, Any]:
    """Facts about a checkpoint as JSON values, schema ``compress.inspect/1``.

    Args:
        zeros: also read the weights and count zero values. Sparsity always comes from keep-masks.
    """
    code = {"trust_remote_code": trust_remote_code, "ignore_auto_map": ignore_auto_map}
    spec, metadata = open_headers(model, **code, offline=offline)
    size = opened_size(spec, 1 << 62, metadata)
    if expanded(model).is_dir() and not spec.sources:
        size = size_on_disk(open_checkpoint(model, **code))
    counts = {}
    if zeros:
        checkpoint = open_checkpoint(model, **code, offline=offline)
        counts = {t.name: int((checkpoint.tensor(t.name).data == 0).sum()) for t in spec.stored() if t.is_float}
    return {
        "schema": "compress.inspect/1",
        "checkpoint": str(model),
        "notes": list(spec.notes),
        "model_type": spec.structure.model_type,
        "class": spec.structure.class_name,
        "compact": needs_code(spec),
        "edits": dict(Counter(edit.kind for edit in spec.structure.edits)),
        "size": asdict(size),
        "cache": []
        if size.cache is None
        else [
            {"length": length, "bytes": cache_bytes(spec, length)}
            for length in plan_lengths(model_map(spec).trained_positions)
        ],
        "dtypes": dict(Counter(t.dtype for t in spec.stored())),
        "modules": modules(spec),
        "tensors": [
            _row(spec, t, counts.get(t.name)) for t in sorted(spec.tensors.values(), key=lambda t: natural(t.name))
        ],
    }


def architecture(
    model: str | Path,
    *,
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    offline: bool = False,
    text: bool = False,
) -> tuple[dict[str, Any], str | None]:
    """Facts about a checkpoint's architecture as JSON values, schema ``compress.architecture/1``.

    Also, with ``text``, an inferred record as Python text. Raises `CompressError` for that of a written record.
    """
    options = {"trust_remote_code": trust_remote_code, "ignore_auto_map": ignore_auto_map, "offline": offline}
    spec, _ = open_headers(model, **options)
    mapped = model_map(spec)
    data = {"schema": "compress.architecture/1", "checkpoint": str(model), **describe(mapped)}
    return data, to_python(mapped) if text else None


def _row(spec: Spec, tensor: Tensor, zero: int | None) -> dict[str, Any]:
    """One tensor of `inspect`; ``zero``: how many of its values are zero, where they were counted."""
    row: dict[str, Any] = {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "storage": storage_name(spec, tensor),
        "bytes": stored_bytes(spec, tensor),
        "sparsity": sparsity(tensor),
        "tied_to": tensor.alias_of,
    }
    if zero is not None:
        row["zeros"] = zero / max(tensor.count, 1)
    return row


def sparsity(tensor: Tensor) -> float | None:
    """Share of the weights that the keep-mask removes; None without a mask."""
    return None if tensor.kept is None else 1 - tensor.kept / max(tensor.count, 1)


def stored_bytes(spec: Spec, tensor: Tensor) -> int:
    """Bytes of a tensor's arrays in the file; an alias has none."""
    if tensor.name in spec.sources and not tensor.alias_of:
        return spec.sources[tensor.name].bytes
    return 0 if tensor.alias_of else sum(part.bytes for part in parts(tensor))


def modules(spec: Spec) -> list[dict[str, Any]]:
    """Bytes, parameters and sparsity of each block, and of each module outside the blocks, in natural order of their names."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in spec.tensors.values():
        groups.setdefault(_group(spec, tensor), []).append(tensor)
    return [_summary(spec, name, groups[name]) for name in sorted(groups, key=natural)]


def _group(spec: Spec, tensor: Tensor) -> str:
    """Path of the tensor's block, or the module that owns it outside the blocks."""
    path = model_map(spec).path_of(tensor.name)
    return (tensor.module or tensor.name) if path is None else path.removesuffix(".")


def _summary(spec: Spec, name: str, tensors: Iterable[Tensor]) -> dict[str, Any]:
    tensors = list(tensors)
    own = [t for t in tensors if t.alias_of is None]
    masked = [t for t in own if t.kept is not None]
    tied = [t.alias_of for t in sorted(tensors, key=lambda t: -t.count) if t.alias_of]
    return {
        "module": name,
        "parameters": sum(t.count for t in own if t.is_float),
        "bytes": sum(stored_bytes(spec, t) for t in own),
        "dtypes": sorted({t.dtype for t in own}),
        "storage": sorted({storage_name(spec, t) for t in own}),
        "sparsity": 1 - sum(t.kept or 0 for t in masked) / sum(t.count for t in masked) if masked else None,
        "tied_to": tied[0] if tied and not own else None,
    }
