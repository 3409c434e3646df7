"""How a sparsity is shared among matrices, or neurons to remove among MLPs, looking at calibration data."""

from __future__ import annotations

from collections.abc import Collection
from math import lcm
from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.errors import PassError
from compress.passes.base import Context
from compress.passes.blockwise import measured_divergences, open_runner
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.open import Checkpoint
    from compress.passes.prune_structured.settings import PruneStructuredSettings
    from compress.passes.prune_structured.widths import Widths
    from compress.passes.prune_unstructured.block import Method

#: By loss: how far from the target a matrix may be, and in how many steps to each side losses are measured.
REACH, STEPS = 0.2, 2
UNEVEN = ("`allocation: kl`", "set `allocation: uniform`")
_SETTING = ("`allocation: kl`", "use `allocation: uniform` or `owl`")


def trials(sparsity: float) -> list[float]:
    """Sparsities that losses are measured at, ascending, all between 0 and 1."""
    reach = min(REACH, 0.8 * sparsity, 0.8 * (1 - sparsity))
    return [sparsity + reach * i / STEPS for i in range(-STEPS, STEPS + 1)]


def check_loss(
    spec: Spec, names: Collection[str], setting: tuple[str, str] = _SETTING, key: str = "allocation"
) -> None:
    """Raises `PassError` where losses cannot be measured: without a head that predicts tokens, and for experts.

    Args:
        setting: what asks for it, and what to do without it. key: of that setting.
    """
    mapped, (asks, fix) = model_map(spec), setting
    if not mapped.has_head:
        raise PassError(f"{asks} needs a model that predicts tokens", key=key, fix=fix)
    if expert := next((name for name in sorted(names) if mapped.is_expert(name)), None):
        raise PassError(f"{asks} does not reach {expert}: experts are fused in memory", key=key, fix=fix)


def loss_memory(spec: Spec, names: Collection[str]) -> int:
    """Bytes of measuring losses: the model in float32, and what each trial changes of it in bfloat16."""
    return 4 * spec.parameters + 2 * (2 * STEPS + 1) * sum(spec.tensors[name].count for name in names)


def by_owl(checkpoint: Checkpoint, names: Collection[str], sparsity: float, context: Context) -> dict[str, float]:
    """Sparsity of every tensor: blocks with more outliers are pruned less."""
    from compress.passes.prune_unstructured.block import owl_allocation

    runner = open_runner(checkpoint, names, context, workspace=context.workspace.folder("owl"), with_targets=False)
    chosen, context.details["allocation"] = owl_allocation(runner, sparsity)
    return chosen


def by_loss(
    checkpoint: Checkpoint, names: Collection[str], sparsity: float, method: Method, context: Context
) -> dict[str, float]:
    """Sparsity of every tensor, for the least divergence of the model's output, each matrix's measured by itself.

    Trials are pruned by Wanda where that is the method, else by SparseGPT, each matrix on the inputs of the unpruned model.
    """
    levels = trials(sparsity)
    workspace = context.workspace.folder("loss")

    def measured() -> dict[str, Any] | None:
        from compress.passes.prune_unstructured.block import probe_pruning

        runner = open_runner(checkpoint, names, context, workspace=workspace, with_targets=False)
        read = probe_pruning(runner, "wanda" if method == "wanda" else "sparsegpt", levels)
        return None if context.processes.rank else _shares(checkpoint, sorted(names), levels, sparsity, read, context)

    found = context.workspace.cached("allocation", measured)
    workspace.remove()
    context.details["allocation"] = found
    shares: dict[str, float] = found["sparsity"]
    return shares


def _shares(
    checkpoint: Checkpoint,
    names: list[str],
    levels: list[float],
    sparsity: float,
    read: Any,
    context: Context,
) -> dict[str, Any]:
    from compress.solvers.sparsity_allocation import allocate_sparsity

    losses, _ = measured_divergences(checkpoint, names, lambda name, _: read(name), _SETTING, context)
    tensors = [checkpoint.spec.tensors[name] for name in names]
    sizes = [t.count for t in tensors]
    most = [t.count if t.kept is None else t.kept for t in tensors]
    rows = [list(losses[name].values()) for name in names]
    kept = allocate_sparsity(sizes, most, levels, rows, sum(sizes) - round(sparsity * sum(sizes)))
    shares = {n: 1 - k / size for n, k, size in zip(names, kept, sizes, strict=True)}
    return {
        "sparsity": shares,
        "divergence": {n: dict(zip(map(str, levels), losses[n].values(), strict=True)) for n in names},
    }


def uneven_widths(
    checkpoint: Checkpoint, found: Widths, settings: PruneStructuredSettings, context: Context
) -> dict[str, int]:
    """With `allocation: kl`, by the module that reads them how many neurons go: in all as many as ``found`` says.

    For the least divergence of the model's output, that of each MLP measured by itself, on the inputs of the whole model.
    """
    if not found.uneven:
        return {}
    mlps = found.mlps()
    steps = [lcm(settings.multiple_of, units.multiple) for units, _ in mlps]
    sizes = [units.count // step for (units, _), step in zip(mlps, steps, strict=True)]
    kept = sum((units.count - less) // step for (units, less), step in zip(mlps, steps, strict=True))
    levels = trials(1 - kept / sum(sizes))
    workspace = context.workspace.folder("widths")

    def measured() -> dict[str, Any] | None:
        from compress.passes.prune_structured.block import WidthOptions, probe_widths
        from compress.solvers.sparsity_allocation import allocate_sparsity

        names = [f"{units.name}.weight" for units, _ in mlps]
        block_of = model_map(checkpoint.spec).block_of
        counts = {
            name: (units, [min(max(1, round(share * units.count)), units.count - 1) for share in levels])
            for name, (units, _) in zip(names, mlps, strict=True)
        }
        runner = open_runner(checkpoint, names, context, workspace=workspace, with_targets=False)
        options = WidthOptions({}, {}, settings.importance, settings.compensation != "none", None)
        read = probe_widths(runner, counts, options)
        if context.processes.rank:
            return None
        losses, _ = measured_divergences(checkpoint, names, lambda name, _: read(name), UNEVEN, context)
        rows = [list(losses[name].values()) for name in names]
        left = allocate_sparsity(sizes, sizes, levels, rows, kept)
        gone = {units.name: units.count - n * step for (units, _), n, step in zip(mlps, left, steps, strict=True)}
        blocks = [{"block": block_of(n), "removed": gone[u.name]} for n, (u, _) in zip(names, mlps, strict=True)]
        return {"removed": gone, "blocks": blocks, "divergence": dict(zip(names, rows, strict=True)), "at": levels}

    result = context.workspace.cached("widths", measured)
    workspace.remove()
    context.details["widths"] = result
    removed: dict[str, int] = result["removed"]
    return removed
