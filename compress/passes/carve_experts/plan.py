"""Plan of `carve_experts`: sizes of the experts, and the blocks that stay dense. No torch."""

from __future__ import annotations

from math import lcm

from compress.architectures.conversions.experts import MULTIPLE, ExpertSizes, neurons
from compress.architectures.model_map import model_map
from compress.errors import PassError
from compress.passes.carve_experts.settings import CarveExpertsSettings
from compress.passes.selection import select
from compress.spec.spec import Spec

MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def expert_sizes(spec: Spec, settings: CarveExpertsSettings) -> ExpertSizes:
    """How each MLP is divided. Raises `PassError` if the settings leave no neuron for a part, or a token would use all."""
    total = neurons(spec)
    routed = total - round(settings.shared * total)
    multiple = lcm(MULTIPLE, settings.multiple_of or 1)
    size = multiple * round(routed / settings.experts / multiple)
    if settings.experts * size >= total:
        size -= multiple
    if size < multiple:
        raise PassError(
            f"{settings.experts} experts of at least {multiple} neurons do not fit into the {routed} of {total} neurons that "
            "are not shared",
            key="experts",
            fix=f"set `experts: {routed // multiple}` or fewer",
        )
    shared = total - settings.experts * size
    if settings.active == 1:
        return ExpertSizes(shared, settings.experts, size, settings.experts)
    active = round((settings.active * total - shared) / size)
    if not 1 <= active < settings.experts:
        few = active < 1
        raise PassError(
            f"{settings.active:.0%} of {total} neurons, {shared} of them shared, are "
            f"{'none' if few else 'all'} of {settings.experts} experts of {size}",
            key="active",
            fix="set a smaller `shared` or more `experts`" if few else "set a smaller `active`, or more `experts`",
        )
    return ExpertSizes(shared, settings.experts, size, active)


def dense_blocks(spec: Spec, settings: CarveExpertsSettings) -> list[int]:
    """Numbers of the blocks that keep their MLP. Raises `PassError` if all do, or a pattern divides an MLP."""
    mapped = model_map(spec)
    by_block = {block.index: {block.path + part for part in MLP} for block in mapped.blocks}
    chosen = select({m for modules in by_block.values() for m in modules}, settings, mapped.modules)
    key = "only" if settings.only else "skip"
    for modules in by_block.values():
        if 0 < len(part := chosen & modules) < len(modules):
            raise PassError(
                f"{sorted(part)[0]} is carved together with the rest of its MLP",
                key=key,
                fix=f"name it as {sorted(modules)[0].rpartition('.')[0]}.*",
            )
    dense = [index for index, modules in by_block.items() if not chosen & modules]
    if len(dense) == len(by_block):
        raise PassError("no MLP is left to carve", key=key)
    return dense
