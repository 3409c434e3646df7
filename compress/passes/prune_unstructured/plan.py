"""Plan of `prune_unstructured`: the matrices to prune and the number of weights that each keeps. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from compress.architectures.model_map import Linear, model_map
from compress.errors import PassError
from compress.passes.allocation import require_divergence
from compress.passes.prune_unstructured.settings import PruneUnstructuredSettings
from compress.passes.selection import select_linears
from compress.spec.spec import Spec


def targets(spec: Spec, settings: PruneUnstructuredSettings) -> frozenset[str]:
    """Names of the weights to prune: by default matrices inside blocks, else all that `only` names."""
    mapped = model_map(spec)
    matrices = {x.module: x.name for x in mapped.linears.values() if x.tensor.is_float and x.shared_with is None}
    aliases = {t.module: spec.tensors[t.alias_of].module for t in spec.tensors.values() if t.alias_of}
    modules = {aliases.get(module, module) for module in select_linears(spec, settings)}
    names = frozenset(name for module, name in matrices.items() if module in modules)
    if not names:
        raise PassError(
            "no weight matrix is left to prune", key="only" if settings.only else "skip" if settings.skip else None
        )
    if settings.pattern is not None:
        for name in sorted(names):
            linear = mapped.linears[name]
            if linear.I % settings.pattern.m:
                raise PassError(
                    f"{name} has {linear.I} inputs, which {settings.pattern.m} does not divide",
                    key="pattern",
                    fix=f"skip it: skip: [{linear.module}]",
                )
    if settings.method != "magnitude":
        mapped.require_inside_blocks(names)
    if settings.allocation == "kl":
        require_divergence(spec, names)
    return names


def is_exact(spec: Spec, chosen: frozenset[str], settings: PruneUnstructuredSettings) -> bool:
    """Whether the number of weights that each matrix keeps is known before any weight is read."""
    if settings.allocation != "uniform" or settings.scope == "global":
        return False
    # an earlier mask may leave fewer weights in a group, or a row, than would be kept
    by_part = settings.pattern is not None or settings.method == "wanda"
    return not by_part or all(spec.tensors[name].kept is None for name in chosen)


def kept_weights(linear: Linear, settings: PruneUnstructuredSettings) -> int:
    """Number of weights that a matrix keeps with these settings, without an earlier mask."""
    count = linear.tensor.count
    if settings.pattern is not None:
        return count // settings.pattern.m * settings.pattern.n
    assert settings.sparsity is not None
    if settings.method == "wanda":  # compares within each output
        return linear.O * (linear.I - round(settings.sparsity * linear.I))
    return count - round(settings.sparsity * count)


def with_counts(spec: Spec, before: Spec, counts: Mapping[str, int]) -> Spec:
    """Spec with the counted numbers of kept weights."""
    spec = spec.map(lambda t: replace(t, kept=counts[t.name]) if t.name in counts else t)
    return replace(spec, exact=before.exact)
