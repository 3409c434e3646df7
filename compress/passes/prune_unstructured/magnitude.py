"""Pruning by the magnitude of weights, tensor by tensor. Imports torch."""

from __future__ import annotations

import torch

from compress.architectures.model_map import Linear, model_map
from compress.checkpoint.values import Checkpoint, Derived, Value
from compress.passes.base import Context
from compress.passes.prune_unstructured.plan import with_counts
from compress.passes.prune_unstructured.settings import PruneUnstructuredSettings
from compress.solvers.magnitude import global_counts, keep_largest, keep_n_of_m
from compress.spec.spec import Spec


def magnitude_mask(linear: Linear, value: Value, kept: int, settings: PruneUnstructuredSettings) -> torch.Tensor:
    """Keep-mask of a matrix's ``kept`` largest weights, of each expert's, or of those that the pattern keeps."""
    if settings.pattern is not None:
        data, earlier = value.data, value.mask
        if linear.kernel:
            data, earlier = data.flatten(1), None if earlier is None else earlier.flatten(1)
        mask = keep_n_of_m(data, settings.pattern.n, settings.pattern.m, linear.input_axis, earlier)
        return mask.reshape(value.data.shape)
    if linear.experts and settings.scope == "layer" and value.mask is None:
        return torch.stack([keep_largest(expert, kept // linear.experts) for expert in value.data])
    return keep_largest(value.data, kept, value.mask)


def prune_by_magnitude(
    checkpoint: Checkpoint,
    spec: Spec,
    chosen: frozenset[str],
    settings: PruneUnstructuredSettings,
    context: Context,
) -> Checkpoint:
    """Mask lazily. ``scope: global``, and N:M over an earlier mask, read the chosen weights once before."""
    linears = model_map(spec).linears

    def mask_of(name: str, value: Value, kept: int) -> torch.Tensor:
        return magnitude_mask(linears[name], value, kept, settings)

    if not spec.exact:
        counts: dict[str, int] = {}
        with context.progress.task("scoring", (1 if settings.pattern else 2) * len(chosen)) as task:
            if settings.pattern is not None:
                for name in sorted(chosen):
                    counts[name] = int(mask_of(name, checkpoint.tensor(name), 0).sum())
                    task.advance(note=name)
            elif settings.sparsity is not None:
                total = sum(checkpoint.spec.tensors[name].count for name in chosen)
                counts = global_counts(
                    checkpoint.tensor,
                    sorted(chosen),
                    total - round(settings.sparsity * total),
                    advance=lambda name: task.advance(note=name),
                )
        spec = with_counts(spec, checkpoint.spec, counts)

    def prune(name: str) -> Value:
        value = checkpoint.tensor(name)
        if name not in chosen:
            return value
        kept = spec.tensors[name].kept
        assert kept is not None
        return Value(value.data, mask_of(name, value, kept))

    return Derived(checkpoint, spec, prune)
