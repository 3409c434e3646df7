"""Plan of `prune_unstructured`: the matrices to prune and the number of weights that each keeps. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from compress.architectures.model_map import Linear, model_map
from compress.errors import PassError
from compress.passes.allocation import require_divergence
from compress.passes.prune_unstructured.settings import PruneUnstructuredSettings
from compress.passes.selection import select_linears
from compress.spec.spec import Spec


def targets(spec: Spec, settings: PruneUnstructuredSettings) -> frozenset[str]:
    """Names of the weights to prune: by default matrices inside blocks, else all that `only` names."""
    mapped = model_map(spec)
    matrices: dict[str, list[Linear]] = {}
    for x in mapped.linears.values():
        if x.tensor.is_float and x.shared_with is None:
            matrices.setdefault(x.module, []).append(x)
    aliases = {t.module: spec.tensors[t.alias_of].module for t in spec.tensors.values() if t.alias_of}
    modules = {aliases.get(module, module) for module in select_linears(spec, settings)}
    names = frozenset(x.name for module in modules for x in _layers_first(matrices.get(module, [])))
    if not names:
        raise PassError(
            "no weight matrix is left to prune", key="only" if settings.only else "skip" if settings.skip else None
        )
    if settings.pattern is not None:
        odd = [x for x in (mapped.linears[name] for name in sorted(names)) if x.I % settings.pattern.m]
        if odd:
            raise _odd(odd, settings.pattern.m)
    if settings.method != "magnitude":
        # layers between stages are pruned by magnitude, beside blocks that are calibrated
        inside = {name for name in names if mapped.linears[name].block is not None or not mapped.linears[name].is_layer}
        mapped.require_inside_blocks(inside or names)
    if allocation_of(spec, settings) == "kl":
        require_divergence(spec, names)
    return names


def allocation_of(spec: Spec, settings: PruneUnstructuredSettings) -> Literal["uniform", "owl", "kl"]:
    """The allocation that ``auto`` stands for: by divergence where a sparsity is given and the model predicts tokens."""
    if settings.allocation != "auto":
        return settings.allocation
    allocates = settings.sparsity is not None and settings.method != "magnitude"
    return "kl" if allocates and model_map(spec).has_head else "uniform"


def _odd(linears: list[Linear], m: int) -> PassError:
    """Error that names all matrices whose inputs ``m`` does not divide."""
    widths = ", ".join(map(str, sorted({x.I for x in linears})))
    patterns = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", x.module) for x in linears)
    one, first = len(linears) == 1, linears[0]
    return PassError(
        f"{first.name} has {first.I} inputs, which {m} does not divide"
        + ("" if one else f", nor those of {len(linears) - 1} others ({widths})"),
        key="pattern",
        fix=f"skip it: skip: [{first.module}]" if one else f"skip them: skip: [{', '.join(patterns)}]",
    )


def _layers_first(linears: list[Linear]) -> list[Linear]:
    """Those of a module's matrices that are linear layers; all where none is. Experts may have biases of two axes beside."""
    return [x for x in linears if x.is_layer] or linears


def is_exact(spec: Spec, chosen: frozenset[str], settings: PruneUnstructuredSettings) -> bool:
    """Whether the number of weights that each matrix keeps is known before any weight is read."""
    if allocation_of(spec, settings) != "uniform" or settings.scope == "global":
        return False
    if not all(_halves_fit(model_map(spec).linears[name], settings) for name in chosen):
        return False
    # an earlier mask may leave fewer weights in a group, or a row, than would be kept
    by_part = settings.pattern is not None or settings.method == "wanda"
    return not by_part or all(spec.tensors[name].kept is None for name in chosen)


def kept_weights(linear: Linear, settings: PruneUnstructuredSettings) -> int:
    """Number of weights that a matrix keeps with these settings, without an earlier mask."""
    experts = max(1, linear.experts)
    count = linear.tensor.count // experts
    if settings.pattern is not None:
        return experts * (count // settings.pattern.m * settings.pattern.n)
    assert settings.sparsity is not None
    if settings.method == "wanda":  # compares within each output
        return linear.O * (linear.I - round(settings.sparsity * linear.I))
    return experts * (count - round(settings.sparsity * count))


def _halves_fit(linear: Linear, settings: PruneUnstructuredSettings) -> bool:
    """Whether gate and up, which calibrated methods prune apart, keep as many weights as both of an expert together."""
    if not linear.experts or settings.method not in ("sparsegpt", "alps") or settings.sparsity is None:
        return True
    count = linear.tensor.count // linear.experts
    return count % 2 == 0 and round(settings.sparsity * count) == 2 * round(settings.sparsity * count / 2)


def with_counts(spec: Spec, before: Spec, counts: Mapping[str, int]) -> Spec:
    """Spec with the counted numbers of kept weights."""
    spec = spec.map(lambda t: replace(t, kept=counts[t.name]) if t.name in counts else t)
    return replace(spec, exact=before.exact)
