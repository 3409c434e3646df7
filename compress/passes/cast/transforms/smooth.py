"""Smoothing: inputs that are hard to round are divided by factors, channel by channel; the weights around them take these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from compress.architectures.channels import Channels
from compress.architectures.model_map import model_map
from compress.blockwise.linears import TargetLinear
from compress.checkpoint.values import Checkpoint, torch_dtype
from compress.passes.base import Context
from compress.passes.cast.largest_inputs import largest_inputs
from compress.passes.cast.settings import CastSettings
from compress.passes.cast.transforms.plan import smoothed_channels
from compress.passes.cast.transforms.steps import Steps
from compress.solvers.smoothing import smoothing_scales


def smoothed(checkpoint: Checkpoint, settings: CastSettings, context: Context) -> Checkpoint:
    """The checkpoint with inputs smoothed as the settings say; scales are kept in the workspace."""
    channels = smoothed_channels(checkpoint.spec, settings)
    return smooth(checkpoint, zip(channels, _kept_scales(checkpoint, channels, settings, context), strict=True))


def smooth(checkpoint: Checkpoint, channels: Iterable[tuple[Channels, torch.Tensor]]) -> Checkpoint:
    """The checkpoint whose channels are divided by scales, float64 [count], where they are written; readers undo it."""
    steps = Steps(checkpoint, checkpoint.spec)
    for one, scale in channels:
        _smooth(checkpoint, steps, one, scale)
    return steps.applied()


def _smooth(checkpoint: Checkpoint, steps: Steps, channels: Channels, scale: torch.Tensor) -> None:
    """Divide channels by scales where they are written, and multiply the columns that read them."""
    if channels.kind in ("attention norm", "mlp norm"):
        weight, scale = _norm(checkpoint, channels, scale)
        name = f"{channels.source.module}.weight"
        steps.add(name, lambda values: weight.to(values.dtype))
        bias = f"{channels.source.module}.bias"
        if bias in checkpoint.spec.tensors:
            steps.add(bias, lambda values: (values / scale).to(values.dtype))
    else:
        steps.scale(channels.source, lambda: 1 / scale)
    for place in channels.readers:
        steps.scale(place, lambda: scale)


def _norm(checkpoint: Checkpoint, norm: Channels, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of a norm divided by scales, as its dtype stores it, and the scales that this comes to, float64."""
    name = f"{norm.source.module}.weight"
    weight = checkpoint.tensor(name).data.double() + norm.offset
    stored = (weight / scale - norm.offset).to(torch_dtype(checkpoint.spec.tensors[name].dtype)).double()
    sound = (weight != 0) & (stored + norm.offset != 0)
    stored = torch.where(sound, stored, weight - norm.offset)
    return stored, torch.where(sound, weight / (stored + norm.offset), 1.0)


def _kept_scales(
    checkpoint: Checkpoint, channels: Sequence[Channels], settings: CastSettings, context: Context
) -> list[torch.Tensor]:
    """Scales of channels, as an earlier run left them, or measured in one pass over the calibration samples."""
    from safetensors.torch import load_file

    workspace, strength = context.workspace, settings.smoothing
    assert strength is not None
    if not workspace.done("smoothing"):
        linears, weights = model_map(checkpoint.spec).linears, dict[str, torch.Tensor]()
        readers = dict.fromkeys(f"{place.module}.weight" for one in channels for place in one.readers)

        def visit(linear: TargetLinear) -> None:
            weights[linear.tensor] = linear.weight.abs().amax(0).float().cpu()

        names = [name for name in readers if linears[name].is_layer]  # inputs of routers are those of experts
        inputs = largest_inputs(checkpoint, names, context, "smoothing", visit)
        scales = (smoothing_scales(_widest(one, inputs), _widest(one, weights), strength) for one in channels)
        workspace.save_tensors("smoothing", {str(number): scale for number, scale in enumerate(scales)})
        workspace.finish("smoothing")
    kept = load_file(workspace.tensors("smoothing"))
    return [kept[str(number)] for number in range(len(channels))]


def _widest(channels: Channels, largest: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Largest magnitude of each channel over all places that read it, [count]."""
    result = torch.zeros(channels.count)
    for place in channels.readers:
        if (values := largest.get(f"{place.module}.weight")) is not None:
            entries, numbers = (torch.tensor(list(places)) for places in (place.entries, place.channels))
            result = result.scatter_reduce(0, numbers, values[entries], "amax")
    return result
