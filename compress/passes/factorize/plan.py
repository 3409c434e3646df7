"""Plan of `factorize`: the matrices to factorise, and their ranks. No torch."""

from __future__ import annotations

from compress.architectures.model_map import model_map
from compress.errors import PassError
from compress.passes.factorize.settings import FactorizeSettings
from compress.passes.selection import select_linears
from compress.spec.spec import Spec

#: The setting that measures divergences, as errors name it, and the setting to use instead.
ALLOCATION = ("`allocation: kl`", "use `allocation: uniform`")


def targets(spec: Spec, settings: FactorizeSettings) -> list[str]:
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


def uniform_ranks(spec: Spec, settings: FactorizeSettings) -> dict[str, int]:
    """Ranks by tensor, all with the same share of parameters; none where factors would not be smaller."""
    ranks, linears = {}, model_map(spec).linears
    for name in targets(spec, settings):
        outputs, inputs = linears[name].O, linears[name].I
        rank, multiple = settings.rank, settings.multiple_of or 1
        if rank is None:
            exact = _rank_for(outputs, inputs, settings.keep_parameters or 0)
            rank = max(exact // multiple, min(exact, 1)) * multiple
        if rank < 1:
            raise PassError(
                f"{settings.keep_parameters:.0%} of {name} [{outputs}, {inputs}] is less than one rank",
                key="keep_parameters",
            )
        if rank * (outputs + inputs) < outputs * inputs:
            ranks[name] = rank
    if not ranks:
        key = "rank" if settings.rank else "keep_parameters"
        raise PassError("factors of that rank are as large as the matrices, or larger", key=key, fix="ask for less")
    return ranks


def _rank_for(outputs: int, inputs: int, share: float) -> int:
    return int(share * outputs * inputs / (outputs + inputs) + 1e-9)
