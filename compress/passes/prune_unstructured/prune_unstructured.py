"""Unstructured and N:M pruning: by weight magnitude tensor by tensor, or block by block with calibration data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.architectures.model_map import model_map
from compress.errors import PassError
from compress.passes.allocation import probes_memory
from compress.passes.base import EDITED, Context, InputMultiple, Mode, Pass, Storage
from compress.passes.memory import runner_memory
from compress.passes.prune_unstructured.plan import allocation_of, is_exact, kept_weights, targets
from compress.passes.prune_unstructured.settings import PruneUnstructuredSettings
from compress.passes.work import DataSizes, Tuning, runner_work
from compress.solvers.memory import ALPS, SPARSEGPT, WANDA
from compress.spec.spec import Spec, Tensor
from compress.work import Work

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint

#: Passes over each weight that choosing the largest and masking the others take.
_SORTING = 40.0


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

    def input_multiple(self, settings: PruneUnstructuredSettings) -> InputMultiple:
        """The M of a pattern N:M is needed."""
        return InputMultiple() if settings.pattern is None else InputMultiple(settings.pattern.m, settings.pattern.m)

    def mode_for(self, settings: PruneUnstructuredSettings) -> Mode:
        """``stream`` by magnitude, else ``blockwise``."""
        return "stream" if settings.method == "magnitude" else "blockwise"

    def plan(self, spec: Spec, settings: PruneUnstructuredSettings) -> Spec:
        """Exact, except for ``scope: global`` and for N:M or Wanda over an earlier mask: there counts are estimates."""
        chosen, linears = targets(spec, settings), model_map(spec).linears

        def change(tensor: Tensor) -> Tensor:
            if tensor.name not in chosen:
                return tensor
            kept = kept_weights(linears[tensor.name], settings)
            return replace(tensor, kept=kept if tensor.kept is None else min(kept, tensor.kept))

        pruned = spec.map(change)
        exact = is_exact(spec, chosen, settings)
        if exact and pruned.tensors == spec.tensors and not settings.allow_noop:
            raise PassError(
                "every chosen weight matrix is that sparse already", fix="ask for more, or leave the pass out"
            )
        return replace(pruned, exact=spec.exact and exact)

    def memory(self, spec: Spec, settings: PruneUnstructuredSettings, width: int) -> int | None:
        """Bytes of the block runner, or of measuring divergences; None by magnitude."""
        if settings.method == "magnitude":
            return None
        solver = {"wanda": WANDA, "sparsegpt": SPARSEGPT, "alps": ALPS}[settings.method]
        chosen = targets(spec, settings)
        reconstruction: Literal["floats"] | None = "floats" if settings.reconstruction_epochs else None
        runner = runner_memory(spec, chosen, width, solver, reconstruction=reconstruction)
        if allocation_of(spec, settings) != "kl":
            return runner
        probing = runner_memory(
            spec, chosen, width, WANDA if settings.method == "wanda" else SPARSEGPT, output_curvature=True
        )
        return max(runner, probing + probes_memory(spec, chosen))

    def work(self, spec: Spec, settings: PruneUnstructuredSettings, sizes: DataSizes) -> Work | None:
        """Work of the block runner; sorting magnitudes; None for an allocation that is measured."""
        chosen, calibration = targets(spec, settings), sizes.calibration
        if settings.method == "magnitude":
            work = Work()
            work.add("values", 0, 1, _SORTING * sum(spec.tensors[name].count for name in chosen))
            return work
        if allocation_of(spec, settings) != "uniform" or calibration is None or not model_map(spec).known:
            return None
        factor = {"wanda": None, "sparsegpt": "factor", "alps": "factor"}[settings.method]
        epochs = settings.reconstruction_epochs
        tuning = Tuning(epochs, "floats") if epochs else None
        return runner_work(spec, chosen, calibration, [settings.method], factor=factor, tuning=tuning)

    def apply(self, checkpoint: Checkpoint, settings: PruneUnstructuredSettings, context: Context) -> Checkpoint:
        """Mask lazily by magnitude; else run the block runner, and the result reads its tensors from the workspace."""
        spec, chosen = self.plan(checkpoint.spec, settings), targets(checkpoint.spec, settings)
        if settings.method == "magnitude":
            from compress.passes.prune_unstructured.magnitude import prune_by_magnitude

            return prune_by_magnitude(checkpoint, spec, chosen, settings, context)
        from compress.passes.prune_unstructured.calibrated import prune_blocks

        return prune_blocks(checkpoint, spec, chosen, settings, context)
