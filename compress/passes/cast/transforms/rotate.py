"""Rotations folded into the weights: of the hidden states between blocks (QuaRot, SpinQuant's R1) and of values (R2)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compress.architectures.channels import ChannelPlace, Channels
from compress.checkpoint.values import Checkpoint
from compress.passes.cast.settings import CastSettings
from compress.passes.cast.transforms.plan import residual, values
from compress.passes.cast.transforms.steps import Steps
from compress.solvers.rotation import Rotation
from compress.spec.spec import Spec


def rotated(checkpoint: Checkpoint, spec: Spec, settings: CastSettings, seed: int) -> Checkpoint:
    """The checkpoint with the rotations that the settings name.

    Args:
        spec: that of the result. seed: of the signs.
    """
    steps = Steps(checkpoint, spec)
    if "residual" in settings.rotations:
        _rotate_residual(checkpoint, spec, steps, seed)
    if "values" in settings.rotations:
        for heads in values(spec):
            rotation = Rotation(heads.width, seed)
            for place in heads.places:
                steps.turn(place, rotation)
    return steps.applied()


def _rotate_residual(checkpoint: Checkpoint, spec: Spec, steps: Steps, seed: int) -> None:
    """Fold all norms into the layers that read them, and rotate everything that reads or writes the hidden states."""
    stream = residual(spec)
    rotation, everything = Rotation(stream.width, seed), range(stream.width)
    for norm in stream.norms:
        for place in norm.readers:
            steps.scale(place, _weight(checkpoint, norm))
            steps.turn(place, rotation)
        steps.add(f"{norm.source.module}.weight", _constant(1.0 - norm.offset))
    steps.turn(ChannelPlace(stream.embedding.removesuffix(".weight"), "in", everything, everything), rotation)
    for module in stream.writers:
        steps.turn(ChannelPlace(module, "out", everything, everything), rotation)


def _weight(checkpoint: Checkpoint, norm: Channels) -> Callable[[], torch.Tensor]:
    return lambda: checkpoint.tensor(f"{norm.source.module}.weight").data.double() + norm.offset


def _constant(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda values: torch.full_like(values, value)
