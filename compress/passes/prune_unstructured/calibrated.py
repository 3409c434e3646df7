"""Pruning block by block with calibration data. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from compress.architectures.model_map import model_map
from compress.blockwise.reconstruct import Reconstruction
from compress.checkpoint.values import Checkpoint, Derived, Value
from compress.passes.base import Context
from compress.passes.blockwise import open_runner
from compress.passes.prune_unstructured.allocation import by_divergence, by_owl
from compress.passes.prune_unstructured.block import PruneOptions, prune_block
from compress.passes.prune_unstructured.magnitude import magnitude_mask
from compress.passes.prune_unstructured.plan import allocation_of, with_counts
from compress.passes.prune_unstructured.settings import PruneUnstructuredSettings
from compress.spec.spec import Spec


def prune_blocks(
    checkpoint: Checkpoint,
    spec: Spec,
    chosen: frozenset[str],
    settings: PruneUnstructuredSettings,
    context: Context,
) -> Checkpoint:
    """Prune block by block; the result reads its tensors from the workspace."""
    assert settings.method != "magnitude"
    reconstruction = (
        Reconstruction(settings.reconstruction_epochs, settings.reconstruction_lr)
        if settings.reconstruction_epochs
        else None
    )
    sparsity = None if settings.sparsity is None else dict.fromkeys(chosen, settings.sparsity)
    allocation = allocation_of(checkpoint.spec, settings)
    if allocation != "uniform":
        assert settings.sparsity is not None
        if allocation == "owl":
            linears = model_map(checkpoint.spec).linears
            inside = {name for name in chosen if linears[name].block is not None}
            shares = by_owl(checkpoint, inside, settings.sparsity, context)
            sparsity = {**dict.fromkeys(chosen, settings.sparsity), **shares}
        else:
            sparsity = by_divergence(checkpoint, chosen, settings.sparsity, settings.method, context)
    options = PruneOptions(
        method=settings.method, sparsity=sparsity, pattern=settings.pattern, reconstruction=reconstruction
    )
    runner = open_runner(
        checkpoint, chosen, context, workspace=context.workspace, with_targets=reconstruction is not None, leave=chosen
    )
    result = runner.run(lambda block: prune_block(block, options), f"pruning by {settings.method}")
    context.details["blocks"] = result.details
    read = _with_left(result.reader(), spec, runner.left, settings)
    if not spec.exact:
        spec = with_counts(spec, checkpoint.spec, {name: int(_mask(read(name)).sum()) for name in sorted(chosen)})
    return Derived(checkpoint, spec, read)


def _with_left(
    read: Callable[[str], Value], spec: Spec, left: Collection[str], settings: PruneUnstructuredSettings
) -> Callable[[str], Value]:
    """The same function, which prunes by magnitude the tensors that calibration left."""
    linears = model_map(spec).linears

    def pruned(name: str) -> Value:
        value, kept = read(name), spec.tensors[name].kept
        if name not in left or kept is None:
            return value
        return Value(value.data, magnitude_mask(linears[name], value, kept, settings))

    return pruned


def _mask(value: Value) -> torch.Tensor:
    assert value.mask is not None
    return value.mask
