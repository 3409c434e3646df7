"""Sparsity of every matrix by outliers (OWL) or by the measured divergence of the model's predictions."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from compress.passes.allocation import SPARSITY, probe_sparsities
from compress.passes.base import Context
from compress.passes.blockwise import measured_divergences, open_runner

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.passes.prune_unstructured.block import Method


def by_owl(checkpoint: Checkpoint, names: Collection[str], sparsity: float, context: Context) -> dict[str, float]:
    """Sparsity of every tensor: blocks with more outliers are pruned less."""
    from compress.passes.prune_unstructured.block import owl_allocation

    runner = open_runner(checkpoint, names, context, workspace=context.workspace.folder("owl"), with_targets=False)
    chosen, context.details["allocation"] = owl_allocation(runner, sparsity)
    return chosen


def by_divergence(
    checkpoint: Checkpoint, names: Collection[str], sparsity: float, method: Method, context: Context
) -> dict[str, float]:
    """Sparsity of every tensor, for the least divergence of the model's predictions. Each matrix is measured alone.

    Probes are pruned by Wanda if that is the method, else by SparseGPT, each matrix on the inputs of the unpruned model.
    """
    levels = probe_sparsities(sparsity)
    workspace = context.workspace.folder("loss")

    def measured() -> dict[str, Any] | None:
        from compress.passes.prune_unstructured.block import probe_pruning

        runner = open_runner(checkpoint, names, context, workspace=workspace, with_targets=False)
        read = probe_pruning(runner, "wanda" if method == "wanda" else "sparsegpt", levels)
        return None if context.processes.rank else _shares(checkpoint, sorted(names), levels, sparsity, read, context)

    allocation = context.workspace.cached("allocation", measured)
    workspace.remove()
    context.details["allocation"] = allocation
    shares: dict[str, float] = allocation["sparsity"]
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

    losses, _ = measured_divergences(checkpoint, names, lambda linear, _: read(linear.name), SPARSITY, context)
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
