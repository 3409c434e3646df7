"""Which blocks may go, in models whose blocks differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from compress.architectures.model_map import model_map
from compress.errors import PassError
from compress.passes.prune_structured.settings import PruneStructuredSettings
from compress.spec.spec import Spec


def alike(spec: Spec) -> bool:
    """Whether all blocks have the same tensors."""
    blocks = model_map(spec).blocks
    kinds = {frozenset(replace(t, name=part) for part, t in b.tensors.items() if t.alias_of is None) for b in blocks}
    return len(kinds) == 1


def removable(
    plan: Callable[[Spec, PruneStructuredSettings], Spec], spec: Spec
) -> Callable[[tuple[int, ...]], bool] | None:
    """A function that says whether the class takes a model without those blocks; None where all blocks are alike.

    Args:
        plan: of the pass.
    """
    if alike(spec):
        return None

    @cache
    def can_go(blocks: tuple[int, ...]) -> bool:
        try:
            plan(spec, PruneStructuredSettings(layers=blocks, importance="magnitude", compensation="none"))
        except PassError:
            return False
        return True

    return can_go
