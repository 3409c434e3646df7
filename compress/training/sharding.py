"""Student and teachers over many processes (FSDP2): each holds a part of every tensor, and all of it while it is used."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor


def shard(module: torch.nn.Module, blocks: Any, device: str) -> None:
    """Shard a module in place over all processes: its blocks each by itself, and what is left together.

    Blocks that share parameters are left to the whole, which holds each of them once.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    users = Counter(id(p) for block in blocks for p in block.parameters())
    for block in blocks:
        if all(users[id(p)] == 1 for p in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether `shard` was called on it."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def release(module: torch.nn.Module) -> None:
    """Let go of whole tensors that a forward pass without a backward one leaves, so that the next one sees changed weights."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU; of a sharded one every process must ask."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu()


def norm_of(parameters: list[torch.nn.Parameter]) -> Tensor:
    """The norm of all gradients together, over all processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as the part that ``parameter`` holds of it."""
    if not hasattr(parameter, "device_mesh"):
        return tensor.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
