"""Unstructured and N:M pruning by weight magnitude, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress import architectures
from compress.checkpoint.spec import Spec, Tensor
from compress.errors import PassError
from compress.passes.base import Context, Pass, PassSettings, select
from compress.settings import PatternNM, Share

if TYPE_CHECKING:
    from compress.checkpoint.open import Checkpoint


class PruneUnstructuredSettings(PassSettings):
    """Settings of `prune_unstructured`."""

    method: Literal["magnitude"] = Field(default="magnitude", description="How weights are scored: `magnitude` is |w|.")
    sparsity: Share | None = Field(default=None, description="Share of the weights to remove, such as 50%.")
    pattern: PatternNM | None = Field(
        default=None, description="N:M: keep N of every M weights along the input, as 2:4."
    )
    scope: Literal["layer", "global"] = Field(
        default="layer", description="One threshold per weight matrix (`layer`), or one for all of them (`global`)."
    )

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either `sparsity` or `pattern`")
        if self.pattern is not None and self.scope == "global":
            raise ValueError("`scope: global` goes with `sparsity`, not with `pattern`")
        return self


class PruneUnstructured(Pass[PruneUnstructuredSettings]):
    """The smallest weights of each matrix are removed; a keep-mask says which, also where a kept weight is zero.

    Weights that an earlier pass removed stay removed and count towards the sparsity.
    """

    name: ClassVar[str] = "prune_unstructured"
    summary: ClassVar[str] = "Remove single weights: a share of them, or N:M."
    settings = PruneUnstructuredSettings
    mode = "stream"
    preserves = frozenset({"masks", "aliases"})
    source: ClassVar[str] = "Han et al. 2015, arXiv 1506.02626; N:M: Mishra et al. 2021, arXiv 2104.08378"

    def plan(self, spec: Spec, settings: PruneUnstructuredSettings) -> Spec:
        """Exact for ``scope: layer`` and for N:M; for ``scope: global`` each matrix's count is an estimate."""
        chosen = self._targets(spec, settings)

        def change(tensor: Tensor) -> Tensor:
            if tensor.name not in chosen:
                return tensor
            kept = _kept(tensor, settings)
            return replace(tensor, kept=kept if tensor.kept is None else min(kept, tensor.kept))

        pruned = spec.map(change)
        exact = self._exact(spec, chosen, settings)
        if exact and pruned.tensors == spec.tensors and not settings.allow_noop:
            raise PassError(
                "every chosen weight matrix is that sparse already", fix="ask for more, or leave the pass out"
            )
        return replace(pruned, exact=spec.exact and exact)

    def apply(self, checkpoint: Checkpoint, settings: PruneUnstructuredSettings, context: Context) -> Checkpoint:
        """Lazily mask; ``scope: global`` and N:M over an earlier mask read the chosen weights once beforehand."""
        import torch

        from compress.checkpoint.open import Derived, Value
        from compress.solvers.magnitude import global_counts, keep_largest, keep_n_of_m

        spec = self.plan(checkpoint.spec, settings)
        chosen = self._targets(checkpoint.spec, settings)
        axis = architectures.of(spec.structure.config).input_axis if architectures.known(spec.structure.config) else -1

        def mask_of(value: Value, kept: int) -> torch.Tensor:
            if settings.pattern is None:
                return keep_largest(value.data, kept, value.mask)
            # N:M runs along the input dimension, the first one for GPT-2's transposed weights
            along = axis if value.data.ndim == 2 else -1
            return keep_n_of_m(value.data, settings.pattern.n, settings.pattern.m, along, value.mask)

        if not spec.exact:
            counts: dict[str, int] = {}
            with context.progress.task("scoring", (1 if settings.pattern else 2) * len(chosen)) as task:
                if settings.pattern is not None:
                    for name in sorted(chosen):
                        counts[name] = int(mask_of(checkpoint.tensor(name), 0).sum())
                        task.advance(note=name)
                elif settings.sparsity is not None:
                    total = sum(checkpoint.spec.tensors[name].count for name in chosen)
                    counts = global_counts(
                        checkpoint.tensor,
                        sorted(chosen),
                        total - round(settings.sparsity * total),
                        advance=lambda name: task.advance(note=name),
                    )
            spec = spec.map(lambda t: replace(t, kept=counts[t.name]) if t.name in chosen else t)
            spec = replace(spec, exact=checkpoint.spec.exact)

        def prune(name: str) -> Value:
            value = checkpoint.tensor(name)
            if name not in chosen:
                return value
            kept = spec.tensors[name].kept
            assert kept is not None
            return Value(value.data, mask_of(value, kept))

        return Derived(checkpoint, spec, prune)

    def _targets(self, spec: Spec, settings: PruneUnstructuredSettings) -> frozenset[str]:
        """Names of the weights to prune: matrices inside blocks by default, any that `only` names."""
        matrices = {t.module: t.name for t in spec.stored() if t.is_float and len(t.shape) >= 2}
        if settings.only:
            default: list[str] = []
        else:
            record = architectures.of(spec.structure.config)
            default = [module for module, name in matrices.items() if record.is_block_matrix(name)]
        aliases = {t.module: spec.tensors[t.alias_of].module for t in spec.tensors.values() if t.alias_of}
        universe = [t.module for t in spec.tensors.values()]
        modules = {aliases.get(module, module) for module in select(default, settings, universe)}
        names = frozenset(name for module, name in matrices.items() if module in modules)
        if not names:
            raise PassError(
                "no weight matrix is left to prune", key="only" if settings.only else "skip" if settings.skip else None
            )
        if settings.pattern is not None:
            axis = (
                architectures.of(spec.structure.config).input_axis if architectures.known(spec.structure.config) else -1
            )
            for name in sorted(names):
                shape = spec.tensors[name].shape
                width = shape[axis] if len(shape) == 2 else shape[-1]
                if width % settings.pattern.m:
                    raise PassError(
                        f"{name} has {width} inputs, which {settings.pattern.m} does not divide",
                        key="pattern",
                        fix=f"skip it: skip: [{spec.tensors[name].module}]",
                    )
        return names

    @staticmethod
    def _exact(spec: Spec, chosen: frozenset[str], settings: PruneUnstructuredSettings) -> bool:
        if settings.pattern is not None:  # an earlier mask may leave a group with fewer than N weights
            return all(spec.tensors[name].kept is None for name in chosen)
        return settings.scope == "layer"


def _kept(tensor: Tensor, settings: PruneUnstructuredSettings) -> int:
    if settings.pattern is not None:
        return tensor.count // settings.pattern.m * settings.pattern.n
    assert settings.sparsity is not None
    return tensor.count - round(settings.sparsity * tensor.count)
