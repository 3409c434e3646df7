"""Allocation by measured divergence: the amounts that are probed, what a model must have for it, and its memory."""

from __future__ import annotations

from collections.abc import Collection

from compress.architectures.model_map import model_map
from compress.blockwise.memory_budget import PROBE_BYTES
from compress.errors import PassError
from compress.spec.spec import Spec

#: Largest distance of a matrix from the target sparsity, and number of probes on each side of it.
REACH, STEPS = 0.2, 2
#: A setting that allocates by divergence, as errors name it, and the setting to use instead.
SPARSITY = ("`allocation: kl`", "use `allocation: uniform` or `owl`")
UNEVEN = ("`allocation: kl`", "set `allocation: uniform`")


def probe_sparsities(sparsity: float) -> list[float]:
    """Sparsities that losses are measured at, ascending, all between 0 and 1."""
    reach = min(REACH, 0.8 * sparsity, 0.8 * (1 - sparsity))
    return [sparsity + reach * i / STEPS for i in range(-STEPS, STEPS + 1)]


def require_divergence(
    spec: Spec,
    names: Collection[str],
    setting: tuple[str, str] = SPARSITY,
    key: str = "allocation",
    *,
    apart: bool = False,
) -> None:
    """Raise `PassError` if divergences cannot be measured: the model predicts no tokens.

    Args:
        setting: the setting that needs them, and what to use instead.
        key: the key of that setting.
        apart: matrices change by themselves, which experts cannot where they are fused in memory.
    """
    mapped, (asks, fix) = model_map(spec), setting
    if not mapped.has_head:
        raise PassError(f"{asks} needs a model that predicts tokens", key=key, fix=fix)
    if apart and (expert := next((name for name in sorted(names) if mapped.is_expert(name)), None)):
        raise PassError(f"{asks} does not reach {expert}: experts are fused in memory", key=key, fix=fix)


def divergence_memory(spec: Spec, names: Collection[str]) -> int:
    """Bytes for measuring divergences: the model in float32, and the change of every probe in bfloat16."""
    return 4 * spec.parameters + 2 * (2 * STEPS + 1) * sum(spec.tensors[name].count for name in names)


def probes_memory(spec: Spec, names: Collection[str]) -> int:
    """Bytes of the changes of a block's matrices, in bfloat16, that wait to be measured together."""
    peak = 0
    for one in model_map(spec).blocks:
        sizes = [2 * (2 * STEPS + 1) * x.tensor.count // max(1, x.experts) for x in one.linears if x.name in names]
        peak = max(peak, min(sum(sizes), max(PROBE_BYTES, max(sizes, default=0))))
    return peak
