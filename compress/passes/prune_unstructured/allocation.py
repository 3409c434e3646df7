"""Sparsity of every matrix by outliers (OWL) or by the measured divergence of the model's predictions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from compress.passes.allocation import probe_sparsities
from compress.passes.base import Context
from compress.passes.blockwise import open_runner

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
    Tensors that are not measured are pruned to the common sparsity.
    """
    levels = probe_sparsities(sparsity)
    workspace = context.workspace.folder("loss")

    def measured() -> dict[str, Any] | None:
        from compress.blockwise.memory_budget import PROBE_TOKENS
        from compress.passes.prune_unstructured.divergence import pruning_divergences
        from compress.sensitivity.output_curvature import Gradients

        runner = open_runner(checkpoint, names, context, workspace=workspace, with_targets=False, leave=names)
        folder = workspace.folder("gradients")
        gradients = Gradients(runner.executor, folder, context.progress, tokens=PROBE_TOKENS)
        losses = pruning_divergences(runner, gradients, "wanda" if method == "wanda" else "sparsegpt", levels)
        return None if context.processes.rank else _shares(checkpoint, losses, levels, sparsity)

    allocation = context.workspace.cached("allocation", measured)
    workspace.remove()
    context.details["allocation"] = allocation
    return {**dict.fromkeys(names, sparsity), **allocation["sparsity"]}


def _shares(
    checkpoint: Checkpoint, losses: Mapping[str, list[float]], levels: list[float], sparsity: float
) -> dict[str, Any]:
    """Sparsity of the measured tensors, and what was measured, by sparsity."""
    from compress.solvers.sparsity_allocation import allocate_sparsity

    names = sorted(losses)
    tensors = [checkpoint.spec.tensors[name] for name in names]
    sizes = [t.count for t in tensors]
    most = [t.count if t.kept is None else t.kept for t in tensors]
    rows = [losses[name] for name in names]
    kept = allocate_sparsity(sizes, most, levels, rows, sum(sizes) - round(sparsity * sum(sizes)))
    shares = {n: 1 - k / size for n, k, size in zip(names, kept, sizes, strict=True)}
    return {
        "sparsity": shares,
        "divergence": {name: dict(zip(map(str, levels), losses[name], strict=True)) for name in names},
    }
