"""Slice whole units out of a checkpoint, lazily. `architectures.resize` makes the specs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from compress.architectures import resize
from compress.architectures.groups import KVHeadMerge, Slice
from compress.checkpoint.edits.sized import sized
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint, Value
    from compress.passes.prune_structured.widths import Widths

Entries = Mapping[str, Mapping[int, Sequence[int]]]


def drop_blocks(checkpoint: Checkpoint, drop: Sequence[int]) -> Checkpoint:
    """The checkpoint without these blocks."""
    spec, source = resize.without_blocks(checkpoint.spec, drop)
    return _derived(checkpoint, spec, source, {})


def drop_experts(checkpoint: Checkpoint, keep: Mapping[int, Sequence[int]]) -> Checkpoint:
    """The checkpoint with only these experts of each block; the router's rows are sliced too."""
    return _derived(checkpoint, *resize.without_experts(checkpoint.spec, keep))


def narrow(checkpoint: Checkpoint, kept: Iterable[resize.Kept], planned: Widths) -> Checkpoint:
    """The checkpoint with only these units, of the kinds and numbers of ``planned``."""
    spec, entries = narrowed(checkpoint.spec, kept, planned)
    return _derived(checkpoint, spec, {}, entries)


def narrowed(spec: Spec, kept: Iterable[resize.Kept], planned: Widths) -> tuple[Spec, Entries]:
    """Spec with only these units, and the kept entries of the tensors that lose some."""
    entries = resize.kept_entries(spec, kept)
    return sized(resize.resized(spec, entries, planned.config), planned.sized()), entries


def merge(checkpoint: Checkpoint, merges: Iterable[KVHeadMerge]) -> Checkpoint:
    """The checkpoint with the KV heads of a group replaced by their mean; shapes stay."""
    from compress.checkpoint.values import Derived, Value
    from compress.solvers.kv_merge import merge

    members: dict[str, list[tuple[Slice, KVHeadMerge]]] = {}
    for one in merges:
        for member in (one.key, one.value):
            members.setdefault(member.module, []).append((member, one))

    def mean(name: str) -> Value:
        value = checkpoint.tensor(name)
        data = value.data
        for member, one in members.get(name.rpartition(".")[0], ()):
            span = member.span(one.heads)
            data = data.clone()
            rows = data[span.start : span.stop].view(one.heads, member.width, *data.shape[1:])
            rows.copy_(merge(rows.double(), one.left))
        return Value(data, value.mask)

    return Derived(checkpoint, checkpoint.spec, mean)


def narrow_hidden(checkpoint: Checkpoint, channels: Sequence[int]) -> Checkpoint:
    """The checkpoint with only these hidden channels; norms and embeddings are scaled as if the others were zero."""
    from compress.checkpoint.values import Derived, Value

    entries, config = resize.hidden_entries(checkpoint.spec, channels)
    scales = resize.hidden_scales(checkpoint.spec, len(channels))
    cut = _derived(checkpoint, resize.resized(checkpoint.spec, entries, config), {}, entries)

    def scaled(name: str) -> Value:
        value = cut.tensor(name)
        if name not in scales:
            return value
        factor, offset = scales[name]
        data = ((value.data.double() + offset) * factor - offset).to(value.data.dtype)
        return Value(data, value.mask)

    return Derived(checkpoint, cut.spec, scaled)


def _derived(checkpoint: Checkpoint, spec: Spec, source: Mapping[str, str], entries: Entries) -> Checkpoint:
    import torch

    from compress.checkpoint.values import Derived, Value

    def read(name: str) -> Value:
        old = source.get(name, name)
        value = checkpoint.tensor(old)
        data, mask = value.data, value.mask
        for axis, rows in entries.get(old, {}).items():
            index = torch.tensor(list(rows))
            data = data.index_select(axis, index)
            mask = None if mask is None else mask.index_select(axis, index)
        return Value(data, mask, value.codes)

    if not spec.exact and checkpoint.spec.exact:  # only a mask's values give its count
        from dataclasses import replace

        counts = {}
        for name, tensor in spec.tensors.items():
            if tensor.kept is not None and tensor.alias_of is None and source.get(name, name) in entries:
                mask = read(name).mask
                assert mask is not None
                counts[name] = int(mask.sum())
        spec = replace(spec.map(lambda t: replace(t, kept=counts.get(t.name, t.kept))), exact=True)
    return Derived(checkpoint, spec, read)
