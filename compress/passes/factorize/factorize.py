"""Low-rank factors: replace a weight matrix by the product of two thin ones."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.architectures.model_map import model_map
from compress.checkpoint.edits.factors import factored
from compress.passes.allocation import require_divergence
from compress.passes.base import Context, InputMultiple, Pass, Storage
from compress.passes.blockwise import open_runner
from compress.passes.factorize.allocation import allocate_ranks
from compress.passes.factorize.plan import ALLOCATION, targets, uniform_ranks
from compress.passes.factorize.settings import FactorizeSettings
from compress.passes.factorize.work import factorize_work
from compress.passes.memory import divergence_memory, runner_memory
from compress.passes.work import DataSizes
from compress.solvers.memory import LOW_RANK
from compress.spec.spec import Spec
from compress.work import Work

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint, Value


class Factorize(Pass[FactorizeSettings]):
    """Weight matrices of blocks become products of two, with the smallest error of their outputs on calibration data.

    The factors are linear layers, which later passes prune, cast and train. A matrix whose factors would not be smaller
    stays. Structured pruning with repair loses less at nearly equal bytes (docs/benchmarks.md).

    Sample recipe::

        store: compact
        passes:
          - factorize: {keep_parameters: 60%}
    """

    name: ClassVar[str] = "factorize"
    summary: ClassVar[str] = "Replace weight matrices by products of two low-rank factors."
    settings = FactorizeSettings
    mode = "blockwise"
    needs = frozenset({"calibration"})
    yields: ClassVar[frozenset[Storage]] = frozenset({"float", "factored"})
    source: ClassVar[str] = (
        "SVD-LLM, arXiv 2403.07378, towards the original's outputs; ranks by the Fisher information and the knapsack; block "
        "reconstruction: BRECQ, arXiv 2102.05426"
    )

    def followed_by(self, settings: FactorizeSettings, later: InputMultiple) -> FactorizeSettings:
        """Choose the multiple that later passes need, where none is given."""
        unset = settings.multiple_of is None and later.needed > 1
        return settings.model_copy(update={"multiple_of": later.needed}) if unset else settings

    def plan(self, spec: Spec, settings: FactorizeSettings) -> Spec:
        """Exact, except with `allocation: kl`: then the plan assumes that all matrices matter alike."""
        ranks = uniform_ranks(spec, settings)
        if settings.by_divergence:
            require_divergence(spec, ranks, ALLOCATION)
        return replace(factored(spec, ranks), exact=spec.exact and not settings.by_divergence)

    def memory(self, spec: Spec, settings: FactorizeSettings, width: int) -> int | None:
        """Bytes of the block runner; with `allocation: kl` also of measuring divergences."""
        names = targets(spec, settings)
        reconstruction: Literal["factors"] | None = "factors" if settings.reconstruction_epochs else None
        share = settings.keep_parameters or 1
        solver = replace(LOW_RANK, kept=4 * share)
        runner = runner_memory(spec, names, width, solver, reconstruction=reconstruction, trained=share)
        if not settings.by_divergence:
            return runner
        return max(runner, divergence_memory(spec, names, width, replace(LOW_RANK, kept=0), 1))

    def work(self, spec: Spec, settings: FactorizeSettings, sizes: DataSizes) -> Work | None:
        """Work of the block runner, and of measuring divergences where they allocate the ranks."""
        if sizes.calibration is None or not model_map(spec).known:
            return None
        return factorize_work(spec, uniform_ranks(spec, settings), settings, sizes.calibration)

    def apply(self, checkpoint: Checkpoint, settings: FactorizeSettings, context: Context) -> Checkpoint:
        """Run the block runner; the result reads its factors from the workspace."""
        from compress.blockwise.reconstruct import Reconstruction
        from compress.checkpoint.values import Derived, Value, torch_dtype
        from compress.passes.factorize.block import FactorOptions, factor_block

        spec = checkpoint.spec
        ranks = uniform_ranks(spec, settings)
        if settings.by_divergence:
            ranks = allocate_ranks(checkpoint, settings, context)
        reconstruction = (
            Reconstruction(settings.reconstruction_epochs, settings.reconstruction_lr)
            if settings.reconstruction_epochs
            else None
        )
        options = FactorOptions(ranks, {n: torch_dtype(spec.tensors[n].dtype) for n in ranks}, reconstruction)
        runner = open_runner(
            checkpoint, ranks, context, workspace=context.workspace.folder("runner"), with_targets=True
        )
        result = runner.run(lambda block: factor_block(block, options), "factorising", late_targets=True)
        context.details["blocks"] = result.details
        read = result.reader()
        after = factored(spec, ranks)
        modules = {spec.tensors[name].module: name for name in ranks}

        def value(name: str) -> Value:
            owner, _, kind = name.rpartition(".")
            module, _, part = owner.rpartition(".")
            if module not in modules:
                return read(name)
            if kind == "bias":
                return read(f"{module}.bias")
            up, down = result.factors(modules[module])
            return Value(up if part == "up" else down)

        return Derived(checkpoint, after, value)
