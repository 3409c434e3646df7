"""All transforms of a checkpoint, in their order: rotations, then smoothing of the rotated model. Imports torch."""

from __future__ import annotations

from compress.checkpoint.values import Checkpoint
from compress.passes.base import Context
from compress.passes.cast.settings import CastSettings
from compress.passes.cast.transforms.plan import transformed_spec
from compress.passes.cast.transforms.rotate import rotated
from compress.passes.cast.transforms.smooth import smoothed


def transformed(checkpoint: Checkpoint, settings: CastSettings, context: Context) -> Checkpoint:
    """The checkpoint that `cast` rounds; it computes what the given one does."""
    parts = []
    if settings.rotations:
        spec = transformed_spec(checkpoint.spec, settings)
        checkpoint = rotated(checkpoint, spec, settings, context.seed)
        parts.append(f"rotations of {' and '.join(settings.rotations)}")
    if settings.smoothing is not None:
        checkpoint = smoothed(checkpoint, settings, context)
        parts.append(f"smoothing {settings.smoothing:g}")
    if parts:
        context.details["transforms"] = f"{'; '.join(parts)}, folded into the weights before they were rounded"
    return checkpoint
