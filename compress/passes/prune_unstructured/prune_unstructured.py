"""Unstructured and N:M pruning: by weight magnitude tensor by tensor, or block by block with calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.architectures.model_map import Linear, model_map
from compress.errors import PassError
from compress.passes.allocation import divergence_memory, require_divergence
from compress.passes.base import EDITED, Context, Mode, Pass, Storage
from compress.passes.blockwise import open_runner, runner_memory
from compress.passes.prune_unstructured.allocation import by_divergence, by_owl
from compress.passes.prune_unstructured.settings import PruneUnstructuredSettings
from compress.passes.selection import select_linears
from compress.solvers.memory import ALPS, SPARSEGPT, WANDA
from compress.spec.spec import Spec, Tensor

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Checkpoint, Value


class PruneUnstructured(Pass[PruneUnstructuredSettings]):
    """Removes the weights that change each layer's output least; a mask records them, also where a kept weight is zero.

    Weights that an earlier pass removed stay removed and count towards the sparsity. With calibration data, blocks are
    pruned in order, each on the outputs of the pruned blocks before it, and the remaining weights compensate for the error.

    Sample recipe::

        store: compact
        passes:
          - prune_unstructured: {sparsity: 50%}
    """

    name: ClassVar[str] = "prune_unstructured"
    summary: ClassVar[str] = "Remove single weights: a share of them, or N:M."
    settings = PruneUnstructuredSettings
    mode = "blockwise"
    needs = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Storage]] = EDITED | {"float"}
    source: ClassVar[str] = (
        "magnitude: Han et al. 2015, arXiv 1506.02626; Wanda, arXiv 2306.11695; SparseGPT, arXiv 2301.00774; ALPS, arXiv "
        "2406.07831; N:M: Mishra et al. 2021, arXiv 2104.08378; owl: OWL, arXiv 2310.05175; block reconstruction: BRECQ, arXiv "
        "2102.05426"
    )

    def required_data(self, settings: PruneUnstructuredSettings) -> frozenset[str]:
        """Calibration data for all methods but magnitude."""
        return frozenset() if settings.method == "magnitude" else self.needs

    def mode_for(self, settings: PruneUnstructuredSettings) -> Mode:
        """Tensor by tensor by magnitude, else block by block."""
        return "stream" if settings.method == "magnitude" else "blockwise"

    def plan(self, spec: Spec, settings: PruneUnstructuredSettings) -> Spec:
        """Exact, but for ``scope: global`` and where N:M or Wanda meet an earlier mask: there counts are estimates."""
        chosen, linears = self._targets(spec, settings), model_map(spec).linears

        def change(tensor: Tensor) -> Tensor:
            if tensor.name not in chosen:
                return tensor
            kept = _kept(linears[tensor.name], settings)
            return replace(tensor, kept=kept if tensor.kept is None else min(kept, tensor.kept))

        pruned = spec.map(change)
        exact = self._exact(spec, chosen, settings)
        if exact and pruned.tensors == spec.tensors and not settings.allow_noop:
            raise PassError(
                "every chosen weight matrix is that sparse already", fix="ask for more, or leave the pass out"
            )
        return replace(pruned, exact=spec.exact and exact)

    def memory(self, spec: Spec, settings: PruneUnstructuredSettings, width: int) -> int | None:
        """Of a sweep: embeddings, one block, and the larger of what solving and tuning it take; or of measuring losses."""
        if settings.method == "magnitude":
            return None
        solver = {"wanda": WANDA, "sparsegpt": SPARSEGPT, "alps": ALPS}[settings.method]
        chosen = self._targets(spec, settings)
        reconstruction: Literal["floats"] | None = "floats" if settings.reconstruction_epochs else None
        runner = runner_memory(spec, chosen, width, solver, reconstruction=reconstruction)
        if settings.allocation != "kl":
            return runner
        assert settings.sparsity is not None
        return max(runner, divergence_memory(spec, chosen))

    def apply(self, checkpoint: Checkpoint, settings: PruneUnstructuredSettings, context: Context) -> Checkpoint:
        """By magnitude lazily; else the sweep runs here, and the result reads what it left in the work folder."""
        spec, chosen = self.plan(checkpoint.spec, settings), self._targets(checkpoint.spec, settings)
        if settings.method == "magnitude":
            return _by_magnitude(checkpoint, spec, chosen, settings, context)
        return _calibrated(checkpoint, spec, chosen, settings, context)

    def _targets(self, spec: Spec, settings: PruneUnstructuredSettings) -> frozenset[str]:
        """Names of the weights to prune: matrices inside blocks by default, any that `only` names."""
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

    @staticmethod
    def _exact(spec: Spec, chosen: frozenset[str], settings: PruneUnstructuredSettings) -> bool:
        if settings.allocation != "uniform" or settings.scope == "global":
            return False
        # an earlier mask may leave a group, or a row, with fewer weights than are kept
        by_part = settings.pattern is not None or settings.method == "wanda"
        return not by_part or all(spec.tensors[name].kept is None for name in chosen)


def _kept(linear: Linear, settings: PruneUnstructuredSettings) -> int:
    count = linear.tensor.count
    if settings.pattern is not None:
        return count // settings.pattern.m * settings.pattern.n
    assert settings.sparsity is not None
    if settings.method == "wanda":  # compares within each output
        return linear.O * (linear.I - round(settings.sparsity * linear.I))
    return count - round(settings.sparsity * count)


def _by_magnitude(
    checkpoint: Checkpoint,
    spec: Spec,
    chosen: frozenset[str],
    settings: PruneUnstructuredSettings,
    context: Context,
) -> Checkpoint:
    """Lazily mask; ``scope: global`` and N:M over an earlier mask read the chosen weights once beforehand."""
    from compress.checkpoint.values import Derived, Value
    from compress.solvers.magnitude import global_counts, keep_largest, keep_n_of_m

    linears = model_map(spec).linears

    def mask_of(name: str, value: Value, kept: int) -> torch.Tensor:
        if settings.pattern is None:
            return keep_largest(value.data, kept, value.mask)
        along = linears[name].input_axis
        return keep_n_of_m(value.data, settings.pattern.n, settings.pattern.m, along, value.mask)

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
        spec = _with_counts(spec, checkpoint.spec, counts)

    def prune(name: str) -> Value:
        value = checkpoint.tensor(name)
        if name not in chosen:
            return value
        kept = spec.tensors[name].kept
        assert kept is not None
        return Value(value.data, mask_of(name, value, kept))

    return Derived(checkpoint, spec, prune)


def _calibrated(
    checkpoint: Checkpoint,
    spec: Spec,
    chosen: frozenset[str],
    settings: PruneUnstructuredSettings,
    context: Context,
) -> Checkpoint:
    """Block by block; the changed tensors come from the work folder."""
    from compress.blockwise.reconstruct import Reconstruction
    from compress.checkpoint.values import Derived
    from compress.passes.prune_unstructured.block import PruneOptions, prune_block

    assert settings.method != "magnitude"
    reconstruction = (
        Reconstruction(settings.reconstruction_epochs, settings.reconstruction_lr)
        if settings.reconstruction_epochs
        else None
    )
    sparsity = None if settings.sparsity is None else dict.fromkeys(chosen, settings.sparsity)
    if settings.allocation != "uniform":
        assert settings.sparsity is not None
        if settings.allocation == "owl":
            sparsity = by_owl(checkpoint, chosen, settings.sparsity, context)
        else:
            sparsity = by_divergence(checkpoint, chosen, settings.sparsity, settings.method, context)
    options = PruneOptions(
        method=settings.method, sparsity=sparsity, pattern=settings.pattern, reconstruction=reconstruction
    )
    runner = open_runner(
        checkpoint, chosen, context, workspace=context.workspace, with_targets=reconstruction is not None
    )
    result = runner.run(lambda block: prune_block(block, options), f"pruning by {settings.method}")
    context.details["blocks"] = result.details
    read = result.reader()
    if not spec.exact:
        spec = _with_counts(spec, checkpoint.spec, {name: int(_mask(read(name)).sum()) for name in sorted(chosen)})
    return Derived(checkpoint, spec, read)


def _mask(value: Value) -> torch.Tensor:
    assert value.mask is not None
    return value.mask


def _with_counts(spec: Spec, before: Spec, counts: Mapping[str, int]) -> Spec:
    """The spec with the numbers of weights that were really kept."""
    spec = spec.map(lambda t: replace(t, kept=counts[t.name]) if t.name in counts else t)
    return replace(spec, exact=before.exact)
