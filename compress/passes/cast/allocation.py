"""Formats within a budget, by the measured divergence of the model's predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.passes.base import Context
from compress.passes.blockwise import measured_divergences
from compress.passes.cast.plan import choices, undecided
from compress.passes.cast.settings import CastSettings
from compress.spec.formats import QuantFormat

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint


def allocate_formats(checkpoint: Checkpoint, settings: CastSettings, context: Context) -> dict[str, QuantFormat]:
    """Formats of least measured divergence within the budget, by tensor; kept in the workspace."""
    from compress.sensitivity.matrices import RoundingDelta

    spec = checkpoint.spec
    names = undecided(spec, settings)
    known = choices(spec, settings, [])

    def measured() -> dict[str, Any] | None:
        if context.processes.rank:
            return None
        rounding = RoundingDelta(known.quant_format, settings.options)
        divergences, groups = measured_divergences(
            checkpoint, names, rounding, ("a budget", "name the format with `weights`"), context
        )
        losses = rounding.scaled(divergences)
        among = choices(spec, settings, groups)
        chosen = among.allocate(losses, settings.bits, settings.max_bytes)
        return {"losses": losses, "formats": chosen, "curve": among.curve(losses)}

    allocation = context.workspace.cached("formats", measured)
    context.details["formats"] = [
        {"tensor": n, "format": f, "divergence": allocation["losses"][n][f]} for n, f in allocation["formats"].items()
    ]
    context.details["curve"] = allocation["curve"]
    return known.quant_formats(allocation["formats"])
