"""Plan of `prune_structured`: number of units of each kind to remove, the same for all blocks. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from math import gcd, lcm
from typing import TYPE_CHECKING, Any

from compress.architectures import resize
from compress.architectures.groups import KVHeadMerge, PrunableGroup
from compress.architectures.model_map import model_map
from compress.errors import PassError
from compress.passes.allocation import UNEVEN, require_divergence
from compress.passes.base import InputMultiple
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.passes.prune_structured.settings import PruneStructuredSettings

#: Largest change of a width, as a share of it, for a multiple that later passes prefer.
_NEAR = 1 / 16
#: Least number of widths to try at such multiples.
_STEPS = 16

BlockAmount = tuple[int, ...] | float | int
WidthAmount = float | int


@dataclass(frozen=True)
class Widths:
    """Groups of units with the number to remove, by block; KV heads to merge; and the config of the result.

    With ``uneven`` the config has no MLP width: modules have widths of their own.
    """

    remove: Mapping[int, list[tuple[PrunableGroup, int]]]
    merges: Mapping[int, KVHeadMerge]
    config: Mapping[str, Any]
    uneven: bool = False

    def merged(self) -> list[resize.Kept]:
        """KV heads that are kept."""
        return [merge.kept() for merge in self.merges.values()]

    def sized(self) -> list[str]:
        """Modules that get a width of their own."""
        return [m.module for units, count in self.mlps() if count for m in units.members] if self.uneven else []

    def mlps(self) -> list[tuple[PrunableGroup, int]]:
        """Groups of neurons with the number to remove."""
        return [pair for pair in chain.from_iterable(self.remove.values()) if pair[0].kind == "mlp"]

    def first(self) -> list[resize.Kept]:
        """A choice of units with these numbers, for planning."""
        removed = [(units, _first(units, count)) for block in self.remove.values() for units, count in block if count]
        return [*removed, *self.merged()]


def _first(units: PrunableGroup, remove: int) -> list[int]:
    run, less = units.count // units.groups, remove // units.groups
    return [g * run + i for g in range(units.groups) for i in range(run - less)]


def layers_to_drop(depth: int, layers: BlockAmount, allow_none: bool = False) -> int:
    """Number of blocks to remove."""
    if not depth:
        raise PassError("no list of blocks is known of this model", key="layers", fix="leave `layers` out")
    if isinstance(layers, tuple):
        return len(layers)
    return _count(layers, depth, "layers", "blocks", allow_none)


def active_experts(spec: Spec, amount: WidthAmount) -> int:
    """Number of experts that a token is sent to from now on. Raises `PassError` if it is not below today's."""
    mapped = model_map(spec)
    if mapped.record.active_experts_key is None or not resize.expert_blocks(spec):
        raise PassError(
            f"{mapped.record.model_type} has no experts" if mapped.record.active_experts_key is None
            else "no block of this model has experts",
            key="active_experts",
            fix="leave `active_experts` out",
        )  # fmt: skip
    today = mapped.experts_per_token
    count = amount if isinstance(amount, int) else max(1, round(amount * today))
    if count >= today:
        raise PassError(
            f"each token is sent to {today} experts, and {count} is not fewer",
            key="active_experts",
            fix=f"give a count from 1 to {today - 1}" if today > 1 else "leave `active_experts` out",
        )
    return count


def with_active_experts(spec: Spec, count: int) -> Spec:
    """The spec with each token sent to ``count`` experts; tensors stay."""
    record = model_map(spec).record
    assert record.active_experts_key is not None
    config = resize.with_size(record, spec.structure.config, {record.active_experts_key: count})
    return replace(spec, structure=replace(spec.structure, config=config))


def experts_to_keep(spec: Spec, amount: WidthAmount) -> dict[int, int]:
    """Number of experts to keep in each block that has some."""
    mapped = model_map(spec)
    present = resize.expert_blocks(spec)
    if not present:
        raise PassError(f"{mapped.record.model_type} has no experts", key="experts", fix="leave `experts` out")
    total = next(iter(present.values()))
    keep = total - _count(amount, total, "experts", "experts")
    active = mapped.experts_per_token
    if keep < active:
        raise PassError(
            f"each token is sent to {active} experts, and {keep} would stay",
            key="experts",
            fix=f"at most {total - active} of {total} can go",
        )
    return dict.fromkeys(present, keep)


def hidden_to_keep(spec: Spec, amount: WidthAmount, multiples: InputMultiple) -> int:
    """Number of hidden channels to keep."""
    resize.require_hidden(model_map(spec).record)
    width = model_map(spec).hidden
    neurons = chain.from_iterable(resize.mlp_units(spec).values())
    own = lcm(*(units.multiple for units in neurons))
    return _rounded(width, amount, own, multiples, "hidden", "hidden channels")


def multiples_note(spec: Spec, settings: PruneStructuredSettings) -> str | None:
    """A sentence on the widths that are kept, where they are multiples for later passes; None where nothing asks for these."""
    wanted, parts = lcm(*settings.multiples), []
    if wanted == 1:
        return None
    if settings.hidden is not None:
        width = model_map(spec).hidden
        parts.append(("hidden", hidden_to_keep(spec, settings.hidden, settings.multiples), width))
    if settings.mlp is not None and settings.allocation == "uniform":
        groups = widths(spec, settings).mlps()
        parts += [("mlp", kept, count) for kept, count in sorted({(u.count - less, u.count) for u, less in groups})]
    if not parts:
        return None
    kept = ", ".join(f"{key} {left} of {count} (a multiple of {gcd(left, wanted)})" for key, left, count in parts)
    return f"kept widths are rounded for later passes, or as `multiple_of` asks: {kept}"


def step(count: int, own: int, multiples: InputMultiple) -> int:
    """Number of neurons that come and go together where many widths are tried: the multiples, as far as the width allows.

    Args:
        count: neurons that there are. own: multiple of the family.
    """
    needed = lcm(own, multiples.needed)
    steps = (lcm(needed, half) for half in _halves(multiples.preferred))
    return next((size for size in steps if count % size == 0 and count >= _STEPS * size), needed)


def widths(spec: Spec, amounts: PruneStructuredSettings, own: Mapping[str, int] | None = None) -> Widths:
    """Neurons and heads to remove.

    Args:
        own: with `allocation: kl`, number of neurons to remove by the module that reads them; plans take the same everywhere.

    Raises:
        PassError: the family, or the numbers, do not allow it.
    """
    mapped = model_map(spec)
    config: Mapping[str, Any] = spec.structure.config
    remove: dict[int, list[tuple[PrunableGroup, int]]] = {i: [] for i in range(mapped.depth)}
    if amounts.heads is not None or amounts.kv_heads is not None:
        chosen, config = _heads(spec, amounts)
        for index, groups in chosen.items():
            remove.setdefault(index, []).extend(groups)
    merges: dict[int, KVHeadMerge] = {}
    if amounts.keep_kv_heads is not None:
        merges, config = _merges(spec, amounts.keep_kv_heads)
    if amounts.mlp is not None:
        neurons, config = _neurons(spec, amounts, config)
        for index, groups in neurons.items():
            remove.setdefault(index, []).extend((one, (own or {}).get(one.name, less)) for one, less in groups)
    return Widths(remove, merges, config, amounts.allocation == "kl")


def _neurons(
    spec: Spec, amounts: PruneStructuredSettings, config: Mapping[str, Any]
) -> tuple[dict[int, list[tuple[PrunableGroup, int]]], dict[str, Any]]:
    assert amounts.mlp is not None
    record, units = model_map(spec).record, resize.mlp_units(spec)
    if not units:
        raise PassError(f"the record of {record.model_type} names no MLP", key="mlp", fix=_FIX_RECORD)
    largest: dict[str, PrunableGroup] = {}  # by config field
    multiple: dict[str, int] = {}
    uneven = amounts.allocation == "kl"
    if uneven:
        model_map(spec).require_nameable("allocation", UNEVEN[1])
        require_divergence(
            spec,
            [f"{one.name}.weight" for one in chain.from_iterable(units.values())],
            UNEVEN,
            "allocation",
            apart=True,
        )
    for one in chain.from_iterable(units.values()):
        if one.size_key is None and not uneven:
            raise PassError(
                f"{record.model_type} cannot have another MLP width: its config has no field for it",
                key="mlp",
                fix="remove `layers` instead, or set `allocation: kl`, which needs `store: compact`",
            )
        key = str(one.size_key)
        largest[key] = max(one, largest.get(key, one), key=lambda units: units.count // units.times)
        multiple[key] = lcm(one.multiple, multiple.get(key, 1))
    if len(largest) > 1 and isinstance(amounts.mlp, int):
        raise PassError(
            "MLPs of two kinds, in blocks with and without experts, lose a share and no count",
            key="mlp",
            fix="give a share such as mlp: 25%",
        )
    kept = {
        key: _rounded(one.count // one.times, amounts.mlp, multiple[key], amounts.multiples, "mlp", "neurons")
        for key, one in largest.items()
    }
    chosen = {
        i: [(one, one.count - one.times * kept[str(one.size_key)]) for one in groups] for i, groups in units.items()
    }
    return chosen, dict(config) if uneven else resize.with_size(record, config, kept)


def _heads(
    spec: Spec, amounts: PruneStructuredSettings
) -> tuple[dict[int, list[tuple[PrunableGroup, int]]], dict[str, Any]]:
    """Remove heads within their groups if each group can lose the same number, else whole groups; with `kv_heads` groups."""
    mapped = model_map(spec)
    record, config, queries, groups = mapped.record, mapped.config, mapped.heads, mapped.kv_heads
    key = "heads" if amounts.heads is not None else "kv_heads"
    if record.attention is None:
        raise PassError(f"the record of {record.model_type} names no attention", key=key, fix=_FIX_RECORD)
    per_group = queries // groups
    if amounts.kv_heads is not None:
        gone = _count(amounts.kv_heads, groups, key, "KV heads")
    else:
        assert amounts.heads is not None
        count = _count(amounts.heads, queries, key, "heads")
        if per_group > 1 and count % groups == 0:
            by_block = resize.head_units(spec, whole_groups=False)
            less = {i: [(one, count) for one in units] for i, units in by_block.items()}
            return less, resize.with_heads(record, config, queries - count, groups, key)
        if count % per_group:
            raise PassError(
                f"{count} heads are neither the same number from each of {groups} groups, nor whole groups of {per_group}",
                key=key,
                fix=f"remove a multiple of {groups if groups < per_group else per_group}",
            )
        gone = count // per_group
    by_block = resize.head_units(spec, whole_groups=True)
    less = {i: [(one, gone) for one in units] for i, units in by_block.items()}
    return less, resize.with_heads(record, config, queries - gone * per_group, groups - gone, key)


def _merges(spec: Spec, left: int) -> tuple[dict[int, KVHeadMerge], dict[str, Any]]:
    mapped = model_map(spec)
    merges, heads = resize.merges(spec, left), mapped.kv_heads
    if left >= heads or heads % left:
        possible = [str(n) for n in range(1, heads) if heads % n == 0]
        raise PassError(
            f"{heads} key and value heads cannot be merged into {left}",
            key="keep_kv_heads",
            fix=f"keep {' or '.join(possible)}" if possible else "leave `keep_kv_heads` out",
        )
    for name in (f"{m.module}.weight" for one in merges.values() for m in one.members):
        if spec.tensors[name].kept is not None:
            raise PassError(
                f"{name} has weights removed, and merged heads would fill them in",
                key="keep_kv_heads",
                fix="merge heads before pruning weights",
            )
    return merges, resize.with_kv_heads(mapped.record, mapped.config, left)


_FIX_RECORD = "complete its record: docs/extend/family.md"


def _count(amount: WidthAmount, total: int, key: str, what: str, allow_none: bool = False) -> int:
    """Number to remove. Raises `PassError` for none or all."""
    count = amount if isinstance(amount, int) else round(amount * total)
    if count == 0 and not allow_none:
        raise PassError(f"{amount:.0%} of {total} {what} rounds to none", key=key, fix="ask for more, or give a count")
    if count >= total:
        raise PassError(f"cannot remove {count} of {total} {what}", key=key, fix=f"at most {total - 1} can go")
    return count


def _halves(number: int) -> list[int]:
    """The number, its half and so on, as long as they are whole."""
    return [number] if number % 2 else [number, *_halves(number // 2)]


def _rounded(total: int, amount: WidthAmount, own: int, multiples: InputMultiple, key: str, what: str) -> int:
    """Number to keep, rounded to a multiple. ``own``: the family's."""
    keep = total - _count(amount, total, key, what)
    multiple_of = lcm(own, multiples.needed)
    for size in (lcm(multiple_of, half) for half in _halves(multiples.preferred)):
        near = size * round(keep / size)
        if 0 < near < total and abs(near - keep) <= keep * _NEAR:
            return near
    rounded = max(multiple_of, multiple_of * round(keep / multiple_of))
    if rounded >= total:
        raise PassError(
            f"no multiple of {multiple_of} near {keep} is below the {total} {what} there are",
            key="multiple_of",
            fix="ask for more to go, or for a smaller multiple",
        )
    return rounded
