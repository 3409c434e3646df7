"""Which config field gives the width of an inferred MLP.

Many fields may have the same value. So a field is changed, the class is built again on the meta device, and the parameters
whose shapes change are compared with those of the MLP.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from compress.architectures.groups import Mlp
from compress.architectures.inference.read import Names
from compress.architectures.inference.skeleton import Skeleton, config_key, skeleton_of
from compress.architectures.inferred import Inferred
from compress.architectures.record import Architecture
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Place:
    """A spec and its record, which all caches take for the same: the key beside them tells them apart."""

    __slots__ = ("record", "spec")

    def __init__(self, spec: Spec, record: Inferred) -> None:
        self.spec, self.record = spec, record

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Place)


def sized_mlps(spec: Spec, record: Architecture) -> tuple[Mlp, ...]:
    """The MLPs of a record; inferred ones with the field for their width, where there is one that changes nothing else."""
    if not isinstance(record, Inferred) or record.source != "inferred" or not record.mlps:
        return record.mlps
    return _sized((config_key(spec.structure), record.mlps), _Place(spec, record))


@dataclass(frozen=True)
class _Parameters:
    """Names in memory of an MLP's weights and of all its parameters, and the widths of it in the blocks."""

    weights: set[str]
    every: set[str]
    widths: set[int]


@lru_cache(maxsize=32)
def _sized(key: tuple[str, tuple[Mlp, ...]], place: _Place) -> tuple[Mlp, ...]:
    spec, record = place.spec, place.record
    skeleton, _ = skeleton_of(spec.structure)
    if skeleton is None:
        return record.mlps
    inside = _parameters(spec, record, skeleton)
    before = {name: tuple(value.shape) for name, value in skeleton.state.items()}
    keys: dict[Mlp, str] = {}
    for field, value in _fields(skeleton, record, {w for p in inside.values() for w in p.widths}):
        changed = _changed(spec, record, field, value, before)
        covered = [mlp for mlp, p in inside.items() if p.weights and p.weights <= changed]
        known: set[str] = set().union(*(inside[mlp].every for mlp in covered))
        if covered and changed <= known and all(inside[mlp].widths == {value} for mlp in covered):
            keys |= {mlp: field for mlp in covered if mlp not in keys}
    return tuple(replace(mlp, size_key=keys.get(mlp)) for mlp in record.mlps)


def _parameters(spec: Spec, record: Inferred, skeleton: Skeleton) -> dict[Mlp, _Parameters]:
    owners = {module: mlp for mlp in record.mlps for module in (*mlp.up, mlp.down)}
    result: dict[Mlp, _Parameters] = defaultdict(lambda: _Parameters(set(), set(), set()))
    for name, target in Names(spec, skeleton).targets.items():
        path = record.block_path(name)
        module = "" if path is None else record.starred(path[1].rpartition(".")[0])
        mlp = owners.get(module)
        if mlp is None:
            continue
        result[mlp].every.add(target)
        shape = spec.tensors[name].shape
        if name.endswith(".weight") and len(shape) == 2:
            result[mlp].weights.add(target)
            if module == mlp.down:
                result[mlp].widths.add(shape[record.input_axis % 2])
    return dict(result)


def _fields(skeleton: Skeleton, record: Inferred, widths: set[int]) -> Iterator[tuple[str, int]]:
    """Fields of the main list's config, with the values that are one of the widths; likely names first, unset ones last."""
    part = skeleton.config
    for name in filter(None, record.section.split(".")):
        part = getattr(part, name)
    values: Mapping[str, Any] = part.to_dict()
    named = [key for key, value in values.items() if type(value) is int and value > 1 and value in widths]
    for key in sorted(named, key=lambda key: not any(word in key for word in ("inter", "ffn", "ff", "inner", "mlp"))):
        yield key, values[key]
    for key in (key for key, value in values.items() if value is None and re.search(r"inner|ffn|intermediate", key)):
        yield from ((key, width) for width in sorted(widths))


def _changed(spec: Spec, record: Inferred, field: str, value: int, before: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Parameters whose shapes change with a field; empty where the class cannot be built, or has other parameters then."""
    config = spec.structure.config
    part = {**record.part_of(config), field: value // 2}
    skeleton, _ = skeleton_of(replace(spec.structure, config=record.with_part(config, part)))
    if skeleton is None or skeleton.state.keys() != before.keys():
        return set()
    return {name for name, tensor in skeleton.state.items() if tuple(tensor.shape) != before[name]}
