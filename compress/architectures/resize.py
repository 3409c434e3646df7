"""The units of a checkpoint, from its headers, and the smaller checkpoint that remains when some go. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

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
from compress.architectures.model_map import Block, model_map
from compress.architectures.record import Architecture
from compress.errors import PassError
from compress.spec.spec import Spec

#: Units and the numbers of those that stay.
Kept = tuple[PrunableGroup, Sequence[int]]


def mlp_units(spec: Spec) -> dict[int, list[PrunableGroup]]:
    """Number of a block ▶ the neurons of its MLP; of a block with experts one group per expert."""
    mapped = model_map(spec)
    found: dict[int, list[PrunableGroup]] = {}
    for block in mapped.blocks:
        for mlp in mapped.record.mlps:
            for expert in _experts(block, mlp):
                one = replace(mlp, up=tuple(m.replace("*", expert) for m in mlp.up), down=mlp.down.replace("*", expert))
                if all(f"{module}.weight" in block.tensors for module in (*one.up, one.down)):
                    inputs = mapped.linears[f"{block.path}{one.down}.weight"].I
                    found.setdefault(block.index, []).append(neurons(one, block.path, inputs))
    return found


def head_units(spec: Spec, whole_groups: bool) -> dict[int, list[PrunableGroup]]:
    """By block: query heads, to go within their groups, or whole groups; those of a list together where they share a table."""
    mapped = model_map(spec)
    record, attention = mapped.record, mapped.record.attention
    if attention is None:
        return {}
    counts = mapped.heads, mapped.kv_heads, mapped.head_dim
    make = head_groups if whole_groups else heads
    found: dict[int, list[PrunableGroup]] = {}
    lists: dict[str, list[PrunableGroup]] = {}  # by what the names of the list's first block begin with
    for block in sorted(mapped.blocks, key=lambda block: block.index):
        path, index = block.path, block.index
        one = make(attention, path, *counts)
        if attention.table is None:
            found.setdefault(index, []).append(one)
        else:
            lists.setdefault(path.removesuffix(f"{index}.") + "0.", []).append(one)
        if record.cross is not None and f"{record.cross.output}.weight" in block.tensors:
            found.setdefault(index, []).append(make(record.cross, path, *counts))
    for first, blocks in lists.items():
        found.setdefault(0, []).append(same_heads(attention, blocks, first))
    return found


def merges(spec: Spec, left: int) -> dict[int, KVHeadMerge]:
    """By block: its key and value heads, to become ``left``.

    Raises:
        PassError: no config of the family says that heads share keys and values.
    """
    mapped = model_map(spec)
    record = mapped.record
    if record.attention is None or record.kv_heads_key is None or record.attention.layout == "interleaved":
        raise PassError(
            f"{record.model_type} cannot share keys and values among heads: its config has no field for it",
            key="keep_kv_heads",
            fix="remove `mlp` or `layers` instead",
        )
    rotary = record.rotary_entries(mapped.config)
    return {
        index: KVHeadMerge(one.count, left, rotary, *one.members)
        for index, (one,) in head_units(spec, whole_groups=True).items()
    }


def kept_entries(spec: Spec, kept: Iterable[Kept]) -> dict[str, dict[int, list[int]]]:
    """Tensor name ▶ axis ▶ entries that stay, for every tensor that loses some."""
    gone: dict[tuple[str, int], set[int]] = {}
    for units, keep in kept:
        for member in units.members:
            lost = set(member.span(units.count)) - set(member.entries(units.count, keep))
            for place in _places(spec, member):
                gone.setdefault(place, set()).update(lost)
    result: dict[str, dict[int, list[int]]] = {}
    for (name, axis), lost in gone.items():
        if lost:
            size = spec.tensors[name].shape[axis]
            result.setdefault(name, {})[axis] = [i for i in range(size) if i not in lost]
    return result


def _places(spec: Spec, member: Slice) -> list[tuple[str, int]]:
    weight, bias = f"{member.module}.weight", f"{member.module}.bias"
    places = [(weight, _axis(model_map(spec).record, member.side))]
    return [*places, (bias, 0)] if member.side == "out" and bias in spec.tensors else places


def _axis(record: Architecture, side: str) -> int:
    inputs = record.input_axis % 2
    return inputs if side == "in" else 1 - inputs


def resized(spec: Spec, entries: Mapping[str, Mapping[int, Sequence[int]]], config: Mapping[str, Any]) -> Spec:
    """The spec with only those entries, and that config."""
    tensors = {}
    for name, tensor in spec.tensors.items():
        by_axis = entries.get(tensor.alias_of or name, {})
        shape = tuple(len(by_axis[axis]) if axis in by_axis else size for axis, size in enumerate(tensor.shape))
        tensors[name] = replace(tensor, shape=shape)
    masked = any(spec.tensors[name].kept is not None for name in entries)
    return replace(
        spec, structure=replace(spec.structure, config=config), tensors=tensors, exact=spec.exact and not masked
    )


def with_heads(record: Architecture, config: Mapping[str, Any], queries: int, groups: int) -> dict[str, Any]:
    """The config for so many query heads and key-value heads of the same width; of a relative where that must be.

    Raises:
        PassError: no stock config says it.
    """
    attention = record.attention
    assert attention is not None
    if not attention.free:
        raise PassError(
            f"{record.model_type} cannot have fewer heads: its config takes the hidden size for heads x head width",
            key="heads",
            fix="remove `mlp` or `layers` instead",
        )
    hidden, head_dim = int(record.value(config, record.hidden_key)), record.head_dim(config)
    result = _set(record, config, record.heads_key, queries)
    if record.head_dim_key:
        result[record.head_dim_key] = head_dim
    if record.kv_heads_key:
        result[record.kv_heads_key] = groups
    if attention.even and hidden % queries:
        result = _as_relative(record, result, hidden, queries)
    return result


def _as_relative(record: Architecture, config: dict[str, Any], hidden: int, queries: int) -> dict[str, Any]:
    relative = record.relative
    barred = relative is not None and next((key for key in relative.unless if config.get(key)), None)
    if relative is None or barred:
        raise PassError(
            f"{record.model_type} wants a number of heads that divides the hidden size {hidden}, and {queries} does not"
            + (f" (with `{barred}` no other family does the same)" if barred else ""),
            key="heads",
            fix="remove another number of heads",
        )
    here, there = relative.classes
    names = [there + n.removeprefix(here) if n.startswith(here) else n for n in config.get("architectures") or ()]
    return {**config, **relative.config, "model_type": relative.model_type, "architectures": names}


def with_kv_heads(record: Architecture, config: Mapping[str, Any], left: int) -> dict[str, Any]:
    """The config with so many key and value heads."""
    assert record.kv_heads_key is not None
    return _set(record, config, record.kv_heads_key, left)


def with_size(record: Architecture, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The config with those numbers of neurons."""
    result = dict(config)
    for key, size in sizes.items():
        result = _set(record, result, key, size)
    return result


def _set(record: Architecture, config: Mapping[str, Any], key: str, value: int) -> dict[str, Any]:
    others = {other for other, meant in record.spellings.items() if meant == key}
    return {**{k: v for k, v in config.items() if k not in others}, key: value}


def _experts(block: Block, mlp: Mlp) -> list[str]:
    """Numbers of the experts of a block that have this MLP, as text; [""] for an MLP without experts."""
    before, star, after = mlp.down.partition("*")
    if not star:
        return [""]
    end = f"{after}.weight"
    numbers = [n[len(before) : -len(end)] for n in block.tensors if n.startswith(before) and n.endswith(end)]
    return sorted((n for n in numbers if n.isdigit()), key=int)


# ---- blocks and experts: tensors go, others are renumbered ----


def has_numbers(record: Architecture) -> None:
    """Raises `PassError` for families of which no block can go by its number."""
    if record.stacks:
        raise PassError(
            f"{record.model_type} has blocks in an encoder and in a decoder, whose first ones say what distances add in all "
            "of them: none can go by a number",
            key="layers",
            fix="remove `mlp` or `heads` instead",
        )


def without_blocks(spec: Spec, drop: Sequence[int]) -> tuple[Spec, dict[str, str]]:
    """The spec without those blocks, and its tensor names ▶ what the checkpoint calls them.

    Raises:
        PassError: there is no such block, none would stay, or numbers do not tell blocks.
    """
    record, depth = model_map(spec).record, model_map(spec).depth
    has_numbers(record)
    if wrong := [i for i in drop if i >= depth]:
        raise PassError(f"there is no block {wrong[0]}: the model has {depth}, numbered from 0", key="layers")
    if len(drop) == depth:
        raise PassError(f"cannot remove all {depth} blocks", key="layers")
    keep = [i for i in range(depth) if i not in drop]
    number = {old: new for new, old in enumerate(keep)}
    edits = []
    for edit in spec.structure.edits:
        index = record.block_index(f"{edit.module}.weight")
        if edit.kind == "shared":
            raise PassError(
                f"{edit.module} shares tensors with other blocks: none can go",
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
    """Number of experts of every block that has some."""
    mapped = model_map(spec)
    found = {}
    for block in mapped.blocks:
        numbers = {e for mlp in mapped.record.mlps if "*" in mlp.down for e in _experts(block, mlp)}
        if numbers:
            found[block.index] = len(numbers)
    return found


def without_experts(
    spec: Spec, keep: Mapping[int, Sequence[int]]
) -> tuple[Spec, dict[str, str], dict[str, dict[int, list[int]]]]:
    """The spec with only the experts ``keep`` of each block, its names ▶ the checkpoint's, and what stays of routers."""
    record = model_map(spec).record
    source, entries = {}, {}
    for name in spec.tensors:
        index, path = record.block_index(name), record.block_path(name)
        if index is None or index not in keep or path is None:
            source[name] = name
            continue
        start, rest = path
        module = rest.rpartition(".")[0]
        if module in record.routers:
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
    smaller = _renamed(spec, source, _set(record, spec.structure.config, record.experts_key, count))
    return resized(smaller, entries, smaller.structure.config), source, entries


def _renamed(spec: Spec, source: Mapping[str, str], config: Mapping[str, Any]) -> Spec:
    target = {old: new for new, old in source.items()}
    tensors = {}
    for new, old in source.items():
        tensor = spec.tensors[old]
        alias = tensor.alias_of and target[tensor.alias_of]
        tensors[new] = replace(tensor, name=new, alias_of=alias)
    return replace(spec, structure=replace(spec.structure, config=config), tensors=tensors)


# ---- hidden width ----


def has_hidden(record: Architecture) -> Hidden:
    """What the record says of the hidden width. Raises `PassError` for families where it cannot shrink exactly."""
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
    """Tensor name ▶ axis ▶ entries for the hidden channels that stay, and the config.

    Raises:
        PassError: the family has LayerNorm, no stock config allows it, or a tensor outside the blocks is not known.
    """
    mapped = model_map(spec)
    record, config, width, keep = mapped.record, mapped.config, mapped.hidden, list(channels)
    hidden, attention = has_hidden(record), record.attention
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
                raise PassError(f"{tensor.name} is not known to have the hidden width", key="hidden")
            entries[tensor.name] = {len(tensor.shape) - 1: keep}
            continue
        module = record.starred(path[1].rpartition(".")[0])
        if module in readers and len(tensor.shape) == 2:
            entries[tensor.name] = {_axis(record, "in"): keep}
        elif module in writers:
            entries[tensor.name] = {_axis(record, "out") if len(tensor.shape) == 2 else 0: keep}
        elif module in hidden.norms:
            entries[tensor.name] = {0: keep}
    smaller = _set(record, config, record.hidden_key, len(keep))
    smaller[hidden.epsilon_key] = float(config.get(hidden.epsilon_key, hidden.epsilon)) * width / len(keep)
    return entries, with_heads(
        record,
        {**smaller, **({record.head_dim_key: record.head_dim(config)} if record.head_dim_key else {})},
        mapped.heads,
        mapped.kv_heads,
    )


def hidden_scales(spec: Spec, left: int) -> dict[str, tuple[float, float]]:
    """Tensor name ▶ (factor, offset): (w + offset) · factor - offset makes norms of ``left`` channels give the same values.

    With the others zero, the mean of squares over fewer channels is larger by the ratio of the widths; so is epsilon, in
    `hidden_entries`, and gains grow by its root.
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
            # embeddings that grow below do so in a tied head too
            scales[tensor.name] = (1.0 if hidden.scaled and tied else factor, hidden.offset)
        elif path is None and hidden.scaled and tensor.module.endswith(record.embeddings[0]):
            scales[tensor.name] = (factor, 0.0)
    return scales
