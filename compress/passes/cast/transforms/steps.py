"""Steps on the tensors of a checkpoint: factors and rotations along the channels of a place. Imports torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compress.architectures.channels import ChannelPlace
from compress.architectures.model_map import model_map
from compress.checkpoint.values import Checkpoint, Derived, Value
from compress.solvers.rotation import Rotation
from compress.spec.spec import Spec

#: The values of a tensor in float32 or float64 ▶ the changed values.
TensorStep = Callable[[torch.Tensor], torch.Tensor]
#: Numbers by channel, float64 [count]; read when a tensor is.
ChannelFactors = Callable[[], torch.Tensor]


class Steps:
    """The steps of a checkpoint's tensors, in the order in which they were added."""

    def __init__(self, checkpoint: Checkpoint, spec: Spec) -> None:
        self._checkpoint, self._spec, self._linears = checkpoint, spec, model_map(spec).linears
        self._steps: dict[str, list[TensorStep]] = {}

    def add(self, name: str, step: TensorStep) -> None:
        """Add a step on a tensor."""
        self._steps.setdefault(name, []).append(step)

    def scale(self, place: ChannelPlace, factors: ChannelFactors) -> None:
        """Multiply the channels of a place by factors."""

        def step(values: torch.Tensor, axis: int) -> torch.Tensor:
            by_entry = values.new_ones(values.shape[axis], dtype=torch.float64)
            by_entry[list(place.entries)] = factors()[list(place.channels)]
            shape = [1] * values.ndim
            shape[axis] = -1
            return values * by_entry.to(values.dtype).view(shape)

        self._along(place, step)

    def turn(self, place: ChannelPlace, rotation: Rotation) -> None:
        """Rotate each run of channels of a place that is as long as the rotation is wide."""

        def step(values: torch.Tensor, axis: int) -> torch.Tensor:
            across = values.movedim(axis, -1)
            if len(place.entries) == across.shape[-1]:
                turned = rotation.turned(across.reshape(*across.shape[:-1], -1, rotation.size)).flatten(-2)
            else:
                entries, turned = torch.tensor(list(place.entries)), across.clone()
                own = across[..., entries].reshape(*across.shape[:-1], -1, rotation.size)
                turned[..., entries] = rotation.turned(own).flatten(-2)
            return turned.movedim(-1, axis).contiguous()

        self._along(place, step)

    def _along(self, place: ChannelPlace, step: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        """Add a step along the axis of a place: of the weight, and where the place is outputs also of the bias."""
        weight, bias = f"{place.module}.weight", f"{place.module}.bias"
        linear = self._linears.get(weight)
        axis = 0 if linear is None else linear.input_axis % 2
        if linear is not None and place.side == "out":
            axis = 1 - axis
        self.add(weight, lambda values: step(values, axis))
        if place.side == "out" and bias in self._spec.tensors:
            self.add(bias, lambda values: step(values, 0))

    def applied(self) -> Checkpoint:
        """The checkpoint with the steps applied when a tensor is read; float64 stays, other floats become float32."""

        def read(name: str) -> Value:
            value = self._checkpoint.tensor(name)
            if name not in self._steps:
                return value
            data = value.data if value.data.dtype == torch.float64 else value.data.float()
            for step in self._steps[name]:
                data = step(data)
            return Value(data, value.mask)

        return Derived(self._checkpoint, self._spec, read)
