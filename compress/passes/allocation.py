"""Allocation by measured divergence: the amounts that are probed, what a model must have for it, and the measurement."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from compress.architectures.model_map import model_map
from compress.blockwise.memory_budget import PROBE_BYTES
from compress.errors import PassError
from compress.passes.blockwise import open_runner
from compress.passes.memory import by_blocks
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.blockwise.probe import ProbeFn
    from compress.checkpoint.values import Checkpoint
    from compress.passes.base import Context
    from compress.sensitivity.matrices import Divergences, WeightDeltas
    from compress.workspace import Workspace

#: Largest distance of a matrix from the target sparsity, and number of probes on each side of it.
REACH, STEPS = 0.2, 2
#: Number of probes.
PROBES = 2 * STEPS + 1
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


def probes_memory(spec: Spec, names: Collection[str]) -> int:
    """Bytes of the changes of a block's matrices, in bfloat16, that wait to be measured together."""
    peak = 0
    for one in model_map(spec).blocks:
        sizes = [2 * (2 * STEPS + 1) * x.tensor.count // max(1, x.experts) for x in one.linears if x.name in names]
        peak = max(peak, min(sum(sizes), max(PROBE_BYTES, max(sizes, default=0))))
    return peak


def probed_divergences(
    checkpoint: Checkpoint,
    names: Sequence[str],
    probe: ProbeFn,
    title: str,
    setting: tuple[str, str],
    context: Context,
    workspace: Workspace,
) -> Divergences | None:
    """Return the divergences of changes that a function makes of each block's matrices, on the calibration data.

    One block is in memory where `by_blocks` allows it. Else the whole model is, and other processes than the first get None.

    Args:
        probe: see `sensitivity.matrices.block_divergences`. title: of the progress bar.
        setting: the setting that asks for this, and what to do without it, for errors.
        workspace: a folder of its own.
    """
    from compress.blockwise.probe import probe_matrices
    from compress.sensitivity.matrices import Divergences, block_divergences

    runner = open_runner(checkpoint, names, context, workspace=workspace, with_targets=False)
    if by_blocks(checkpoint.spec, names):
        return block_divergences(runner, title, probe, setting)
    read, rows = probe_matrices(runner, title, probe)
    if context.processes.rank:
        return None
    losses, groups = measured_divergences(checkpoint, names, lambda linear, _: read(linear.name), setting, context)
    return Divergences(losses, groups, [{**row} for row in rows])


def measured_divergences(
    checkpoint: Checkpoint, names: Sequence[str], changes: WeightDeltas, setting: tuple[str, str], context: Context
) -> tuple[dict[str, dict[str, float]], list[list[str]]]:
    """Return `sensitivity.matrices.divergences` on the calibration data."""
    from compress.sensitivity.matrices import divergences

    return divergences(
        checkpoint,
        names,
        changes,
        context.data("calibration"),
        setting=setting,
        device=context.device,
        seed=context.seed,
        progress=context.progress,
    )
