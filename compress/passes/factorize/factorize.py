"""Low-rank factors: two thin matrices in place of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compress.architectures.model_map import model_map
from compress.checkpoint.edits.factors import factored
from compress.errors import PassError
from compress.passes.allocation import require_divergence
from compress.passes.base import Context, Pass, Storage
from compress.passes.blockwise import (
    measured_divergences,
    open_runner,
    runner_memory,
)
from compress.passes.factorize.settings import FactorizeSettings
from compress.passes.selection import select_linears
from compress.solvers.memory import LOW_RANK
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint, Value

_SETTING = ("`allocation: kl`", "use `allocation: uniform`")
#: By loss: in how many steps the rank of a matrix is chosen.
_STEPS = 64


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

    def plan(self, spec: Spec, settings: FactorizeSettings) -> Spec:
        """Exact but for `allocation: kl`, where all matrices are taken to matter alike."""
        from dataclasses import replace

        ranks = self._ranks(spec, settings)
        if settings.by_divergence:
            require_divergence(spec, ranks, _SETTING)
        return replace(factored(spec, ranks), exact=spec.exact and not settings.by_divergence)

    def memory(self, spec: Spec, settings: FactorizeSettings, width: int) -> int | None:
        """Of a sweep; or of measuring losses: the model in float32, and what each trial changes of it in bfloat16."""
        names = self._targets(spec, settings)
        reconstruction: Literal["floats"] | None = "floats" if settings.reconstruction_epochs else None
        runner = runner_memory(spec, names, width, LOW_RANK, reconstruction=reconstruction)
        if not settings.by_divergence:
            return runner
        return max(runner, 4 * spec.parameters + 2 * sum(spec.tensors[n].count for n in names))

    def apply(self, checkpoint: Checkpoint, settings: FactorizeSettings, context: Context) -> Checkpoint:
        """The sweep runs here, and the result reads what it left in the work folder."""
        from compress.blockwise.reconstruct import Reconstruction
        from compress.checkpoint.values import Derived, Value, torch_dtype
        from compress.passes.factorize.block import FactorOptions, factor_block

        spec = checkpoint.spec
        ranks = self._ranks(spec, settings)
        if settings.by_divergence:
            ranks = self._allocate(checkpoint, settings, context)
        reconstruction = (
            Reconstruction(settings.reconstruction_epochs, settings.reconstruction_lr)
            if settings.reconstruction_epochs
            else None
        )
        options = FactorOptions(ranks, {n: torch_dtype(spec.tensors[n].dtype) for n in ranks}, reconstruction)
        runner = open_runner(checkpoint, ranks, context, workspace=context.workspace.folder("sweep"), with_targets=True)
        result = runner.run(lambda block: factor_block(block, options), "factorising")
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

    def _targets(self, spec: Spec, settings: FactorizeSettings) -> list[str]:
        """Names of the matrices to factorise, in order."""
        mapped = model_map(spec)
        mapped.require_nameable()
        matrices = [
            x
            for x in mapped.linears.values()
            if x.shared_with is None and x.tensor.is_float and len(x.tensor.shape) == 2 and x.name.endswith(".weight")
        ]
        chosen = select_linears(spec, settings, lambda x: len(x.tensor.shape) == 2 and x.expert is None)
        names = [x.name for x in matrices if x.module in chosen]
        if not names:
            raise PassError(
                "no weight matrix is left to factorise",
                key="only" if settings.only else "skip" if settings.skip else None,
            )
        mapped.require_inside_blocks(names)
        for name in names:
            if mapped.is_expert(name):
                raise PassError(f"{name} is fused with other experts in memory", key="only")
            if spec.tensors[name].kept is not None:
                raise PassError(
                    f"{name} has weights removed, and factors would fill them in",
                    fix="factorise before pruning weights",
                )
        return names

    def _ranks(self, spec: Spec, settings: FactorizeSettings) -> dict[str, int]:
        """Ranks by tensor, the same share for all; without those whose factors would not be smaller."""
        found, linears = {}, model_map(spec).linears
        for name in self._targets(spec, settings):
            outputs, inputs = linears[name].O, linears[name].I
            rank = settings.rank or _rank_for(outputs, inputs, settings.keep_parameters or 0)
            if rank < 1:
                raise PassError(
                    f"{settings.keep_parameters:.0%} of {name} [{outputs}, {inputs}] is less than one rank",
                    key="keep_parameters",
                )
            if rank * (outputs + inputs) < outputs * inputs:
                found[name] = rank
        if not found:
            key = "rank" if settings.rank else "keep_parameters"
            raise PassError("factors of that rank are as large as the matrices, or larger", key=key, fix="ask for less")
        return found

    def _allocate(self, checkpoint: Checkpoint, settings: FactorizeSettings, context: Context) -> dict[str, int]:
        """Ranks of least measured loss for that many parameters."""
        spec = checkpoint.spec
        uniform, workspace = self._ranks(spec, settings), context.workspace.folder("trial")

        def measured() -> dict[str, Any] | None:
            from compress.passes.factorize.block import probe_factors

            runner = open_runner(checkpoint, uniform, context, workspace=workspace, with_targets=False)
            read, energies = probe_factors(runner, uniform)
            if context.processes.rank:
                return None

            losses, _ = measured_divergences(checkpoint, list(uniform), lambda name, _: read(name), _SETTING, context)
            ranks = _shared_out(spec, uniform, energies, {n: row["trial"] for n, row in losses.items()})
            return {
                "ranks": ranks,
                "divergence": {n: row["trial"] for n, row in losses.items()},
                "measured_at": uniform,
            }

        found = context.workspace.cached("ranks", measured)
        workspace.remove()
        context.details["allocation"] = found
        ranks: dict[str, int] = found["ranks"]
        return ranks


def _rank_for(outputs: int, inputs: int, share: float) -> int:
    return int(share * outputs * inputs / (outputs + inputs) + 1e-9)


def _shared_out(
    spec: Spec, uniform: dict[str, int], energies: dict[str, list[float]], losses: dict[str, float]
) -> dict[str, int]:
    """Ranks for as many parameters as the uniform ones take, of least total loss; matrices better left whole are left out.

    The loss of a matrix at another rank is that of the one measured, scaled by the error of its outputs, which the energies
    tell.
    """
    from compress.solvers.knapsack import choose

    costs, values, options = [], [], []
    linears = model_map(spec).linears
    for name, at in uniform.items():
        outputs, inputs = linears[name].O, linears[name].I
        largest = (outputs * inputs - 1) // (outputs + inputs)
        ranks = sorted({max(1, round(largest * i / _STEPS)) for i in range(1, _STEPS + 1)} | {at})
        tails = [sum(energies[name][r:]) for r in ranks]
        scale = losses[name] / max(sum(energies[name][at:]), 1e-30)
        options.append([*ranks, 0])
        costs.append([*(r * (outputs + inputs) for r in ranks), outputs * inputs])
        values.append([*(scale * tail for tail in tails), 0.0])
    budget = sum(at * (linears[name].O + linears[name].I) for name, at in uniform.items())
    chosen = choose(costs, values, budget)
    assert chosen is not None
    return {name: options[i][c] for i, (name, c) in enumerate(zip(uniform, chosen, strict=True)) if options[i][c]}
