"""A checkpoint with random values, to time a shape: speed depends on shapes alone."""

from __future__ import annotations

import torch

from compress.checkpoint.values import Checkpoint, Derived, Value, torch_dtype
from compress.spec.spec import Spec, Tensor

#: Length of the repeated noise; a prime, so that rows differ and routers distribute the tokens.
_LENGTH = 4099


def with_noise(checkpoint: Checkpoint, spec: Spec, seed: int) -> Checkpoint:
    """Checkpoint of that spec in the folder of another, each float tensor filled with noise, each other one with zeros."""
    noise = 0.02 * torch.randn(_LENGTH, generator=torch.Generator().manual_seed(seed))

    def values(tensor: Tensor) -> torch.Tensor:
        dtype = torch_dtype(tensor.dtype)
        if not tensor.is_float:
            return torch.zeros(tensor.shape, dtype=dtype)
        return noise.to(dtype).repeat(-(-tensor.count // _LENGTH))[: tensor.count].view(tensor.shape)

    return Derived(checkpoint, spec, lambda name: Value(values(spec.tensors[name])))
