"""Plan of sharing: candidate groups of blocks, their checks, and the planned spec. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from compress.architectures.conversions import SharedBlocks, shared_blocks
from compress.architectures.model_map import model_map
from compress.checkpoint.edits import EDIT_KINDS
from compress.checkpoint.edits.shared import shared
from compress.errors import PassError
from compress.passes.base import EDITS
from compress.passes.selection import select
from compress.passes.share.settings import BlockGroups, ShareSettings
from compress.spec.spec import Spec


def is_open(settings: ShareSettings, candidates: Mapping[str, BlockGroups]) -> bool:
    """Whether calibration data decide which blocks share."""
    return len(candidates) > 1 or (isinstance(settings.groups, int) and settings.arrangement == "nearest")


def conversion_of(spec: Spec, settings: ShareSettings, groups: BlockGroups) -> SharedBlocks | None:
    """Conversion to the stock family that shares its blocks in this way, such as ALBERT; None without one."""
    conversion = shared_blocks(spec) if settings.parts == "all" and not settings.rank else None
    return conversion if conversion is not None and conversion.expresses(spec, groups) else None


def shared_spec(spec: Spec, settings: ShareSettings, parts: Sequence[str], groups: BlockGroups) -> Spec:
    """Spec in which the blocks of each group share ``parts``, converted to a stock family if one expresses that."""
    result = shared(spec, groups, parts, settings.rank)
    if (conversion := conversion_of(spec, settings, groups)) is not None:
        return conversion.converted(result, len(groups))[0]
    return result


def shared_parts(spec: Spec, settings: ShareSettings) -> list[str]:
    """Tensors of a block to share, without the block's path. Raises `PassError`."""
    mapped = model_map(spec)
    mapped.require_nameable()
    mapped.require_one_list("distill it to fewer blocks")
    if edit := next(iter(spec.structure.edits), None):
        raise PassError(
            f"{edit.module} {EDITS[EDIT_KINDS[edit.kind].storage]} already",
            key="groups",
            fix="share groups first, and once",
        )
    if mapped.has_experts and settings.parts != "attention":
        raise PassError(
            f"experts of {mapped.record.model_type} are not shared", key="parts", fix="set `parts: attention`"
        )
    if not mapped.blocks:
        raise PassError("no list of blocks is known of this model", key="groups", fix="leave `groups` out")
    roles = ("attention", "mlp") if settings.parts == "matrices" else (settings.parts,)
    first = mapped.blocks[0]
    inside = [part for part, tensor in first.tensors.items() if tensor.is_float]
    if settings.parts != "all":
        # a class may hold buffers of two axes beside its weights
        matrices = {x.name for x in first.linears if x.role in roles and x.is_layer and len(x.tensor.shape) == 2}
        inside = [part for part in inside if first.path + part in matrices]
    chosen = select(
        [block.tensors[part].module for block in mapped.blocks for part in inside if part in block.tensors],
        settings,
        mapped.modules,
    )
    parts = []
    for part in inside:
        module = part.rpartition(".")[0]
        picked = [block.path + module in chosen for block in mapped.blocks]
        if any(picked) and not all(picked):
            raise PassError(
                f"{first.path}{module} is chosen in some blocks and not in others",
                key="only" if settings.only else "skip",
                fix="name the modules of all blocks (`*.mlp.*`); `groups: [[1, 2], …]` leaves blocks alone",
            )
        if all(picked):
            parts.append(part)
    if not parts:
        raise PassError(
            "nothing is left to share", key="only" if settings.only else "skip" if settings.skip else "parts"
        )
    return sorted(parts)


def candidate_groups(spec: Spec, settings: ShareSettings, parts: Sequence[str]) -> dict[str, BlockGroups]:
    """Groups by arrangement, without `nearest` and what `best` must leave out. Raises `PassError`."""
    depth = model_map(spec).depth
    if isinstance(settings.groups, list):
        groups = [list(group) for group in settings.groups]
        if (wrong := next((i for group in groups for i in group if i >= depth), None)) is not None:
            raise PassError(f"there is no block {wrong}: they are numbered 0 to {depth - 1}", key="groups")
        check_groups(spec, settings, groups, parts)
        return {"given": groups}
    assert settings.groups is not None
    count = settings.groups
    if depth % count or count == depth:
        possible = " or ".join(str(n) for n in range(1, depth) if depth % n == 0)
        raise PassError(
            f"{depth} blocks cannot be {count} groups of equal size, two or more in each",
            key="groups",
            fix=f"set groups to {possible}" if possible else None,
        )
    size = depth // count
    candidates: dict[str, BlockGroups] = {
        "sequence": [list(range(i * size, (i + 1) * size)) for i in range(count)],
        "cycle": [list(range(i, depth, count)) for i in range(count)],
    }
    if settings.arrangement in candidates:
        candidates = {settings.arrangement: candidates[settings.arrangement]}
    elif conversion_of(spec, settings, candidates["sequence"]):  # this one loads in stock tools
        candidates = {"sequence": candidates["sequence"]}
    good, problem = {}, None
    for name, groups in candidates.items():
        try:
            check_groups(spec, settings, groups, parts)
            good[name] = groups
        except PassError as error:
            problem = error
    if problem is not None and not good:
        raise problem
    return good


def check_groups(spec: Spec, settings: ShareSettings, groups: BlockGroups, parts: Sequence[str]) -> None:
    """Raise `PassError` unless the blocks of each group are alike, dense, and share more than residuals add."""
    paths = model_map(spec).paths
    for first, *others in groups:
        for block in others:
            if (difference := unlike(spec, first, block, parts)) is not None:
                raise PassError(
                    f"blocks {first} and {block} are unlike: {difference}",
                    key="groups",
                    fix="name `groups` of like blocks",
                )
        for name in (paths[block] + part for block in (first, *others) for part in parts):
            if spec.tensors[name].kept is not None:
                raise PassError(
                    f"{name} has weights removed, and sharing would fill them in",
                    fix="share before pruning weights",
                )
        members = len(others) + 1
        matrices = [t for t in (spec.tensors[paths[first] + part] for part in parts) if len(t.shape) == 2]
        saves = {t.name: ((members - 1) * t.count - 1) // (members * sum(t.shape)) for t in matrices}
        name = min(saves, key=lambda n: saves[n], default="")
        if name and settings.rank > saves[name]:
            raise PassError(
                f"residuals of rank {settings.rank} are as large as what sharing {name} saves",
                key="residual_rank",
                fix=f"set residual_rank to {saves[name]}" + (" or less" if saves[name] else ""),
            )


def unlike(spec: Spec, first: int, other: int, parts: Sequence[str]) -> str | None:
    """Difference between two blocks that prevents sharing; None if they can share."""
    mapped = model_map(spec)
    for key, values in mapped.per_layer.items():
        if values[first] != values[other]:
            return f"{key} is {values[first]} and {values[other]}"
    for part in parts:
        one, two = (spec.tensors.get(mapped.paths[block] + part) for block in (first, other))
        if one is None or two is None or (one.shape, one.dtype) != (two.shape, two.dtype):
            return f"{mapped.paths[first]}{part} has another shape"
    return None


def check_packages(settings: ShareSettings) -> None:
    """Raise `PassError` if `align` needs a package that is not installed."""
    if settings.groups is not None and settings.align and find_spec("scipy") is None:
        raise PassError(
            "putting units into one order needs the package scipy",
            key="align",
            fix="pip install scipy, or set `align: false`",
        )
