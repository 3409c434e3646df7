"""Work of `factorize`, from headers: ranks by divergence, then factors and the reconstruction of blocks. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from compress.architectures.model_map import model_map
from compress.blockwise.memory_budget import HELD_OUT, SAMPLES_PER_STEP
from compress.passes.work import BACK, SampleSize, Tuning, divergence_work, runner_work
from compress.spec.spec import Spec
from compress.work import Work

if TYPE_CHECKING:
    from compress.passes.factorize.settings import FactorizeSettings


def factorize_work(spec: Spec, ranks: Mapping[str, int], settings: FactorizeSettings, size: SampleSize) -> Work:
    """Return the work at these ranks by tensor."""
    result = Work()
    if settings.by_divergence:
        result.add_all(runner_work(spec, ranks, size, (), factor=None))
        result.add_all(_factors(spec, ranks))
        result.add_all(divergence_work(spec, dict.fromkeys(ranks, 1), size))
    epochs = settings.reconstruction_epochs
    tuning = Tuning(epochs, "floats") if epochs else None
    result.add_all(runner_work(spec, ranks, size, (), factor="factor", asymmetric=True, tuning=tuning))
    result.add_all(_factors(spec, ranks))
    linears = model_map(spec).linears
    steps = epochs * (size.samples - max(1, round(HELD_OUT * size.samples))) // SAMPLES_PER_STEP["floats"]
    for name, rank in ranks.items():
        x = linears[name]
        result.add("product", x.O, x.I, 2.0 * x.I)  # the target on the inputs that changed
        # the product of the factors, and their gradients from its own
        result.add("product", x.O, rank, (1 + 2 * BACK) * steps * x.I)
    return result


def _factors(spec: Spec, ranks: Mapping[str, int]) -> Work:
    result, linears = Work(), model_map(spec).linears
    for name in ranks:
        x = linears[name]
        result.add("low_rank" if x.O <= x.I else "low_rank_tall", x.O, x.I)
    return result
