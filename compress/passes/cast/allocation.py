"""Formats within a budget, by the measured divergence of the model's predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from compress.passes.allocation import measured_divergences, probed_divergences
from compress.passes.base import Context
from compress.passes.cast.budget import Choices
from compress.passes.cast.plan import choices, undecided
from compress.passes.cast.settings import CastSettings
from compress.passes.memory import by_blocks
from compress.spec.formats import QuantFormat

if TYPE_CHECKING:
    import torch

    from compress.blockwise.block import Block
    from compress.checkpoint.values import Checkpoint

#: A budget, as errors name it, and what to set instead.
BUDGET = ("a budget", "name the format with `weights`")


def allocate_formats(checkpoint: Checkpoint, settings: CastSettings, context: Context) -> dict[str, QuantFormat]:
    """Formats of least measured divergence within the budget, by tensor; kept in the workspace."""
    spec = checkpoint.spec
    names = undecided(spec, settings)
    known = choices(spec, settings, [])

    def measured() -> dict[str, Any] | None:
        if (results := _measured(checkpoint, names, known, settings, context)) is None:
            return None
        losses, groups = results
        among = choices(spec, settings, groups)
        chosen = among.allocate(losses, settings.bits, settings.max_bytes)
        return {"losses": losses, "formats": chosen, "curve": among.curve(losses)}

    allocation = context.workspace.cached("formats", measured)
    context.details["formats"] = [
        {"tensor": n, "format": f, "divergence": allocation["losses"][n][f]} for n, f in allocation["formats"].items()
    ]
    context.details["curve"] = allocation["curve"]
    return known.quant_formats(allocation["formats"])


def _measured(
    checkpoint: Checkpoint, names: list[str], known: Choices, settings: CastSettings, context: Context
) -> tuple[dict[str, dict[str, float]], list[list[str]]] | None:
    """Divergences by tensor and option, and groups of tensors; None in other processes than the first."""
    from compress.sensitivity.matrices import RoundingDelta

    rounding = RoundingDelta(known.quant_format, settings.options)
    if not by_blocks(checkpoint.spec, names):
        if context.processes.rank:
            return None
        divergences, groups = measured_divergences(checkpoint, names, rounding, BUDGET, context)
        return rounding.scaled(divergences), groups

    def probe(block: Block) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
        for linear in block.linears:
            yield linear.name, rounding(linear, linear.weight.float().contiguous())
        tensors = {linear.tensor for linear in block.linears}
        block.details["rounding"] = {name: rounding.errors[name] for name in sorted(tensors)}

    workspace = context.workspace.folder("budget")
    result = probed_divergences(checkpoint, names, probe, "rounding on trial", BUDGET, context, workspace)
    assert result is not None
    for row in result.rows:  # a killed run has not rounded the blocks that it was done with
        rounding.errors |= row.get("rounding", {})
    workspace.remove()
    return rounding.scaled(result.by_tensor), result.groups
