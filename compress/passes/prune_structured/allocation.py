"""Neurons that each MLP loses, by the measured divergence of the model's predictions. The total is that of the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.passes.allocation import UNEVEN, probe_sparsities, probed_divergences
from compress.passes.base import Context
from compress.passes.prune_structured.widths import step

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.passes.prune_structured.settings import PruneStructuredSettings
    from compress.passes.prune_structured.widths import Widths


def uneven_widths(
    checkpoint: Checkpoint, planned: Widths, settings: PruneStructuredSettings, context: Context
) -> dict[str, int]:
    """With `allocation: kl`: number of neurons to remove, by the name of the module that reads them.

    The total is that of ``planned``. The divergence of each MLP is measured alone, on the inputs of the whole model.
    """
    if not planned.uneven:
        return {}
    mlps = planned.mlps()
    steps = [step(units.count, units.multiple, settings.multiples) for units, _ in mlps]
    sizes = [units.count // step for (units, _), step in zip(mlps, steps, strict=True)]
    kept = sum((units.count - less) // step for (units, less), step in zip(mlps, steps, strict=True))
    levels = probe_sparsities(1 - kept / sum(sizes))
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
        options = WidthOptions({}, {}, settings.importance, settings.compensation != "none", None)
        probe = probe_widths(counts, options)
        result = probed_divergences(checkpoint, names, probe, "removing units on trial", UNEVEN, context, workspace)
        if result is None:
            return None
        rows = [list(result.by_tensor[name].values()) for name in names]
        left = allocate_sparsity(sizes, sizes, levels, rows, kept)
        gone = {units.name: units.count - n * step for (units, _), n, step in zip(mlps, left, steps, strict=True)}
        blocks = [{"block": block_of(n), "removed": gone[u.name]} for n, (u, _) in zip(names, mlps, strict=True)]
        return {"removed": gone, "blocks": blocks, "divergence": dict(zip(names, rows, strict=True)), "at": levels}

    result = context.workspace.cached("widths", measured)
    workspace.remove()
    context.details["widths"] = result
    removed: dict[str, int] = result["removed"]
    return removed
