"""The prunable groups of a checkpoint, and the spec of the smaller checkpoint without some of them. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from compress.architectures.fields import with_field
from compress.architectures.groups import (
    Hidden,
    KVHeadMerge,
    Mlp,
    PrunableGroup,
    Slice,
    head_groups,
    heads,
    neurons,
    same_heads,
)
from compress.architectures.inference.keys import sized_mlps
from compress.architectures.model_map import ModelBlock, model_map
from compress.architectures.record import Architecture
from compress.errors import PassError
from compress.spec.edits import EDIT_KINDS
from compress.spec.spec import Spec

#: Units of one block, and the numbers of those to keep.
Kept = tuple[PrunableGroup, Sequence[int]]


def mlp_units(spec: Spec) -> dict[int, list[PrunableGroup]]:
    """Block number ▶ the neurons of its MLP; one group per expert in a block with experts."""
    mapped = model_map(spec)
    units: dict[int, list[PrunableGroup]] = {}
    mlps = sized_mlps(spec, mapped.record)
    for block in mapped.blocks:
        for mlp in mlps:
            for expert in _experts(block, mlp):
                one = replace(mlp, up=tuple(m.replace("*", expert) for m in mlp.up), down=mlp.down.replace("*", expert))
                if all(f"{module}.weight" in block.tensors for module in (*one.up, one.down)):
                    inputs = mapped.linears[f"{block.path}{one.down}.weight"].I
                    times = int(mapped.record.value(mapped.config, mlp.times) or 1) if mlp.times else 1
                    units.setdefault(block.index, []).append(neurons(one, block.path, inputs, times))
    return units


def head_units(spec: Spec, whole_groups: bool) -> dict[int, list[PrunableGroup]]:
    """Block number ▶ its query heads, or its whole groups of them.

    Where blocks share a table of distances, block 0 has one group for the whole list.
    """
    mapped = model_map(spec)
    record, attention = mapped.record, mapped.record.attention
    if attention is None:
        return {}
    counts = mapped.heads, mapped.kv_heads, mapped.head_dim
    make = head_groups if whole_groups else heads
    units: dict[int, list[PrunableGroup]] = {}
    lists: dict[str, list[PrunableGroup]] = {}  # by the path of the list's first block
    for block in sorted(mapped.blocks, key=lambda block: block.index):
        path, index = block.path, block.index
        one = make(attention, path, *counts)
        if attention.table is None:
            units.setdefault(index, []).append(one)
        else:
            lists.setdefault(path.removesuffix(f"{index}.") + "0.", []).append(one)
        if record.cross is not None and f"{record.cross.output}.weight" in block.tensors:
            units.setdefault(index, []).append(make(record.cross, path, *counts))
    for first, blocks in lists.items():
        units.setdefault(0, []).append(same_heads(attention, blocks, first))
    return units


def merges(spec: Spec, left: int) -> dict[int, KVHeadMerge]:
    """Block number ▶ the merge of its key and value heads into ``left`` heads.

    Raises:
        PassError: the family has no config in which heads share keys and values.
    """
    mapped = model_map(spec)
    record = mapped.record
    if record.attention is None or record.kv_heads_key is None or record.attention.layout == "interleaved":
        raise PassError(
            f"{record.model_type} cannot share keys and values among heads: its config has no field for it",
            key="keep_kv_heads",
            fix="remove `mlp` or `layers` instead",
        )
    record.require_heads_apart("keep_kv_heads")
    rotary = record.rotary_entries(mapped.config)
    return {
        index: KVHeadMerge(one.count, left, rotary, *one.members)
        for index, (one,) in head_units(spec, whole_groups=True).items()
    }


def kept_entries(spec: Spec, kept: Iterable[Kept]) -> dict[str, dict[int, list[int]]]:
    """Tensor name ▶ axis ▶ entries to keep, for every tensor that loses some."""
    removed: dict[tuple[str, int], set[int]] = {}
    for units, keep in kept:
        places = [(m, _places(spec, m)) for m in units.members] + [(m, [(m.module, 0)]) for m in units.alongside]
        for member, place in ((m, place) for m, listed in places for place in listed):
            removed.setdefault(place, set()).update(member.lost(units.count, keep))
    result: dict[str, dict[int, list[int]]] = {}
    for (name, axis), lost in removed.items():
        if lost:
            size = spec.tensors[name].shape[axis]
            result.setdefault(name, {})[axis] = [i for i in range(size) if i not in lost]
    return result


def _places(spec: Spec, member: Slice) -> list[tuple[str, int]]:
    """(tensor, axis) pairs of a slice: the module's weight, and its bias along the outputs."""
    weight, bias = f"{member.module}.weight", f"{member.module}.bias"
    places = [(weight, _axis(model_map(spec).record, member.side))]
    return [*places, (bias, 0)] if member.side == "out" and bias in spec.tensors else places


def _axis(record: Architecture, side: str) -> int:
    """Axis of a block's weight matrices along their inputs (``in``) or outputs."""
    inputs = record.input_axis % 2
    return inputs if side == "in" else 1 - inputs


def resized(spec: Spec, entries: Mapping[str, Mapping[int, Sequence[int]]], config: Mapping[str, Any]) -> Spec:
    """The spec with only those entries of its tensors, and with that config.

    Args:
        entries: tensor name ▶ axis ▶ entries to keep. The result is not exact if a tensor with a keep-mask loses entries.
    """
    tensors = {}
    for name, tensor in spec.tensors.items():
        by_axis = entries.get(tensor.alias_of or name, {})
        shape = tuple(len(by_axis[axis]) if axis in by_axis else size for axis, size in enumerate(tensor.shape))
        tensors[name] = replace(tensor, shape=shape)
    masked = any(spec.tensors[name].kept is not None for name in entries)
    return replace(
        spec, structure=replace(spec.structure, config=config), tensors=tensors, exact=spec.exact and not masked
    )


def with_heads(record: Architecture, config: Mapping[str, Any], queries: int, groups: int, key: str) -> dict[str, Any]:
    """The config with new numbers of query heads and of key and value heads, asked for by the setting ``key``.

    It is that of a relative where this family's config cannot express the numbers. The head width stays.

    Raises:
        PassError: no stock config can express them.
    """
    attention = record.attention
    assert attention is not None
    if not attention.free and record.source == "written":
        raise PassError(
            f"{record.model_type} cannot have fewer heads: its config takes the hidden size for heads x head width",
            key=key,
            fix="remove `mlp` or `layers` instead",
        )
    if queries != int(record.value(config, record.heads_key)):
        record.require_heads_apart(key)
    result = with_field(record, config, record.heads_key, queries)
    if width := record.head_dim_key or (None if record.source == "written" else "head_dim"):  # many classes read it
        result = with_field(record, result, width, record.head_dim(config))
    if record.kv_heads_key:
        result = with_field(record, result, record.kv_heads_key, groups)
    hidden = int(record.value(config, record.hidden_key))
    if attention.even and hidden % queries:
        result = _as_relative(record, result, hidden, queries, key)
    return result


def _as_relative(record: Architecture, config: dict[str, Any], hidden: int, queries: int, key: str) -> dict[str, Any]:
    """The config of the relative that computes the same. Raises `PassError` where there is none."""
    relative = record.relative
    barred = relative is not None and next((key for key in relative.unless if config.get(key)), None)
    if relative is None or barred:
        raise PassError(
            f"{record.model_type} wants a number of heads that divides the hidden size {hidden}, and {queries} does not"
            + (f" (with `{barred}` no other family does the same)" if barred else ""),
            key=key,
            fix="remove another number of heads",
        )
    here, there = relative.classes
    names = [there + n.removeprefix(here) if n.startswith(here) else n for n in config.get("architectures") or ()]
    return {**config, **relative.config, "model_type": relative.model_type, "architectures": names}


def with_kv_heads(record: Architecture, config: Mapping[str, Any], left: int) -> dict[str, Any]:
    """The config with ``left`` key and value heads."""
    assert record.kv_heads_key is not None
    return with_field(record, config, record.kv_heads_key, left)


def with_size(record: Architecture, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The config with new numbers of neurons. ``sizes``: config field ▶ number."""
    result = dict(config)
    for key, size in sizes.items():
        result = with_field(record, result, key, size)
    return result


def _experts(block: ModelBlock, mlp: Mlp) -> list[str]:
    """Numbers of the experts of a block that have this MLP, as text; [""] for an MLP outside experts."""
    before, star, after = mlp.down.partition("*")
    if not star:
        return [""]
    end = f"{after}.weight"
    numbers = [n[len(before) : -len(end)] for n in block.tensors if n.startswith(before) and n.endswith(end)]
    return sorted((n for n in numbers if n.isdigit()), key=int)


# ---- blocks and experts: tensors are removed, others renumbered ----


def require_numbered_blocks(record: Architecture) -> None:
    """Raises `PassError` for families whose blocks cannot be removed by number."""
    if record.stacks:
        table = record.attention is not None and record.attention.table is not None
        lists = "an encoder and a decoder, whose blocks share the first block's table of distances: none"
        raise PassError(
            f"{record.model_type} has {lists if table else 'several lists of blocks: none'} can be removed by its number",
            key="layers",
            fix="remove `mlp` or `heads` instead",
        )


def without_blocks(spec: Spec, drop: Sequence[int]) -> tuple[Spec, dict[str, str]]:
    """The spec without the blocks ``drop``, and the name of each of its tensors ▶ the name in the checkpoint.

    Raises:
        PassError: there is no such block, none would be left, or blocks cannot be removed by number.
    """
    record, depth = model_map(spec).record, model_map(spec).depth
    require_numbered_blocks(record)
    if wrong := [i for i in drop if i >= depth]:
        raise PassError(f"there is no block {wrong[0]}: the model has {depth}, numbered from 0", key="layers")
    if len(drop) == depth:
        raise PassError(f"cannot remove all {depth} blocks", key="layers")
    keep = [i for i in range(depth) if i not in drop]
    number = {old: new for new, old in enumerate(keep)}
    edits = []
    for edit in spec.structure.edits:
        index = record.block_index(f"{edit.module}.weight")
        if EDIT_KINDS[edit.kind].spans_blocks:
            raise PassError(
                f"{edit.module} shares tensors with other blocks, so no block can be removed",
                key="layers",
                fix="remove blocks before sharing",
            )
        if index is None or index in number:
            module = edit.module
            if index is not None:
                module = record.renumber(f"{module}.weight", number[index]).removesuffix(".weight")
            edits.append(replace(edit, module=module))
    source = {}
    for name in spec.tensors:
        index = record.block_index(name)
        if index is None or index in number:
            source[name if index is None else record.renumber(name, number[index])] = name
    smaller = _renamed(spec, source, record.cut_depth(spec.structure.config, keep))
    return replace(smaller, structure=replace(smaller.structure, edits=tuple(edits))), source


def expert_blocks(spec: Spec) -> dict[int, int]:
    """Block number ▶ number of its experts, for every block that has some."""
    mapped = model_map(spec)
    counts = {}
    for block in mapped.blocks:
        numbers = {e for mlp in mapped.record.mlps if "*" in mlp.down for e in _experts(block, mlp)}
        if numbers:
            counts[block.index] = len(numbers)
    return counts


def without_experts(
    spec: Spec, keep: Mapping[int, Sequence[int]]
) -> tuple[Spec, dict[str, str], dict[str, dict[int, list[int]]]]:
    """The spec with only the experts ``keep`` of each block.

    Returns:
        The spec; the name of each of its tensors ▶ the name in the checkpoint; and tensor name ▶ axis ▶ the rows of the routers
        to keep.
    """
    record, present = model_map(spec).record, expert_blocks(spec)
    source, entries = {}, {}
    for name in spec.tensors:
        index, path = record.block_index(name), record.block_path(name)
        if index is None or index not in keep or path is None:
            source[name] = name
            continue
        start, rest = path
        module = rest.rpartition(".")[0]
        if module in record.routers and spec.tensors[name].shape[0] == present[index]:
            entries[name] = {0: list(keep[index])}
        base = next((p for p in record.experts if rest.startswith(f"{p}.")), None)
        if base is None:
            source[name] = name
            continue
        expert, _, tail = rest.removeprefix(f"{base}.").partition(".")
        if int(expert) in keep[index]:
            source[f"{start}{base}.{list(keep[index]).index(int(expert))}.{tail}"] = name
    assert record.experts_key is not None
    count = len(next(iter(keep.values())))
    smaller = _renamed(spec, source, with_field(record, spec.structure.config, record.experts_key, count))
    return resized(smaller, entries, smaller.structure.config), source, entries


def _renamed(spec: Spec, source: Mapping[str, str], config: Mapping[str, Any]) -> Spec:
    """The spec with only the tensors of ``source`` (new name ▶ old name), and with that config."""
    target = {old: new for new, old in source.items()}
    tensors = {}
    for new, old in source.items():
        tensor = spec.tensors[old]
        alias = tensor.alias_of and target[tensor.alias_of]
        tensors[new] = replace(tensor, name=new, alias_of=alias)
    return replace(spec, structure=replace(spec.structure, config=config), tensors=tensors)


# ---- hidden width ----


def require_hidden(record: Architecture) -> Hidden:
    """The record's `Hidden`. Raises `PassError` for families whose hidden width cannot shrink exactly."""
    if record.hidden is None:
        reason = (
            "the encoder and the decoder share it"
            if record.stacks
            else "its LayerNorm takes the mean over all channels"
        )
        raise PassError(
            f"{record.model_type} cannot lose hidden width exactly: {reason}",
            key="hidden",
            fix="remove `mlp` or `layers` instead",
        )
    return record.hidden


def hidden_entries(spec: Spec, channels: Sequence[int]) -> tuple[dict[str, dict[int, list[int]]], dict[str, Any]]:
    """Tensor name ▶ axis ▶ entries of the hidden channels to keep, and the config.

    Raises:
        PassError: the family has LayerNorm, no stock config can express the width, or a tensor outside the blocks does not have
            the hidden width.
    """
    mapped = model_map(spec)
    record, config, width, keep = mapped.record, mapped.config, mapped.hidden, list(channels)
    hidden, attention = require_hidden(record), record.attention
    assert attention is not None
    readers = {attention.query, attention.key, attention.value, *record.routers}
    writers = {attention.output}
    for mlp in record.mlps:
        readers |= set(mlp.up)
        writers.add(mlp.down)
    entries: dict[str, dict[int, list[int]]] = {}
    for tensor in spec.stored():
        path = record.block_path(tensor.name)
        if path is None:
            if tensor.shape[-1] != width:
                raise PassError(f"{tensor.name} has another last axis than the hidden width {width}", key="hidden")
            entries[tensor.name] = {len(tensor.shape) - 1: keep}
            continue
        module = record.starred(path[1].rpartition(".")[0])
        if module in readers and len(tensor.shape) == 2:
            entries[tensor.name] = {_axis(record, "in"): keep}
        elif module in writers:
            entries[tensor.name] = {_axis(record, "out") if len(tensor.shape) == 2 else 0: keep}
        elif module in hidden.norms:
            entries[tensor.name] = {0: keep}
    smaller = with_field(record, config, record.hidden_key, len(keep))
    smaller[hidden.epsilon_key] = float(config.get(hidden.epsilon_key, hidden.epsilon)) * width / len(keep)
    return entries, with_heads(
        record,
        {**smaller, **({record.head_dim_key: record.head_dim(config)} if record.head_dim_key else {})},
        mapped.heads,
        mapped.kv_heads,
        "heads",
    )


def hidden_scales(spec: Spec, left: int) -> dict[str, tuple[float, float]]:
    """Tensor name ▶ (factor, offset): with weights (w + offset) · factor - offset, norms over ``left`` channels give the same.

    The removed channels count as zero. So the mean of squares over the channels left is larger by the ratio of the widths.
    `hidden_entries` scales epsilon by that ratio, and the weights of norms grow by its square root.
    """
    mapped = model_map(spec)
    record, hidden = mapped.record, mapped.record.hidden
    assert hidden is not None
    factor = (mapped.hidden / left) ** 0.5
    tied = any(t.alias_of for t in spec.tensors.values())
    scales = {}
    for tensor in spec.stored():
        path = record.block_path(tensor.name)
        if path is not None and path[1].rpartition(".")[0] in hidden.norms:
            scales[tensor.name] = (factor, hidden.offset)
        elif path is None and tensor.module.endswith(hidden.final) and len(tensor.shape) == 1:
            # embeddings that are scaled below are scaled in a tied head too
            scales[tensor.name] = (1.0 if hidden.scaled and tied else factor, hidden.offset)
        elif path is None and hidden.scaled and tensor.module.endswith(record.embeddings[0]):
            scales[tensor.name] = (factor, 0.0)
    return scales
