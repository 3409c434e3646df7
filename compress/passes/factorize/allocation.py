"""Ranks of the matrices, by the measured divergence of the model's predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.passes.allocation import probed_divergences
from compress.passes.base import Context
from compress.passes.factorize.plan import ALLOCATION, uniform_ranks
from compress.passes.factorize.settings import FactorizeSettings
from compress.solvers.knapsack import choose
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint

#: Number of ranks of a matrix that are considered.
_STEPS = 64


def allocate_ranks(checkpoint: Checkpoint, settings: FactorizeSettings, context: Context) -> dict[str, int]:
    """Ranks of least measured divergence for the same number of parameters."""
    spec = checkpoint.spec
    uniform, workspace = uniform_ranks(spec, settings), context.workspace.folder("trial")

    def measured() -> dict[str, Any] | None:
        from compress.passes.factorize.block import probe_factors

        probe, names = probe_factors(uniform), list(uniform)
        result = probed_divergences(checkpoint, names, probe, "factorising on trial", ALLOCATION, context, workspace)
        if result is None:
            return None
        energies = {name: spectrum for row in result.rows for name, spectrum in row.get("energies", {}).items()}
        divergence = {n: row["trial"] for n, row in result.by_tensor.items()}
        ranks = _knapsack(spec, uniform, energies, divergence, settings.multiple_of or 1)
        return {
            "ranks": ranks,
            "divergence": divergence,
            "measured_at": uniform,
        }

    allocation = context.workspace.cached("ranks", measured)
    workspace.remove()
    context.details["allocation"] = allocation
    ranks: dict[str, int] = allocation["ranks"]
    return ranks


def _knapsack(
    spec: Spec,
    uniform: dict[str, int],
    energies: dict[str, list[float]],
    losses: dict[str, float],
    multiple: int,
) -> dict[str, int]:
    """Ranks of least total loss for as many parameters as the uniform ones take. Matrices that stay whole are left out.

    The loss at another rank is the measured one, scaled by the output error that the energies give.
    """
    costs, values, options = [], [], []
    linears = model_map(spec).linears
    for name, at in uniform.items():
        outputs, inputs = linears[name].O, linears[name].I
        largest = (outputs * inputs - 1) // (outputs + inputs)
        ranks = sorted({max(1, round(largest * i / _STEPS / multiple)) * multiple for i in range(1, _STEPS + 1)} | {at})
        ranks = [rank for rank in ranks if rank <= largest]
        tails = [sum(energies[name][r:]) for r in ranks]
        scale = losses[name] / max(sum(energies[name][at:]), 1e-30)
        options.append([*ranks, 0])
        costs.append([*(r * (outputs + inputs) for r in ranks), outputs * inputs])
        values.append([*(scale * tail for tail in tails), 0.0])
    budget = sum(at * (linears[name].O + linears[name].I) for name, at in uniform.items())
    chosen = choose(costs, values, budget)
    assert chosen is not None
    return {name: options[i][c] for i, (name, c) in enumerate(zip(uniform, chosen, strict=True)) if options[i][c]}
