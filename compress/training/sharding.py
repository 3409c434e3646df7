"""Student and teachers sharded over processes (FSDP2). Each holds a part of every tensor, and all of it in use."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor


def shard(module: torch.nn.Module, blocks: Any, device: str) -> None:
    """Shard a module in place over all processes: each block alone, and the rest together.

    Blocks that share parameters are sharded with the rest, which holds each parameter once.
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
    """Free whole tensors that a lone forward pass leaves, so that the next pass reads changed weights."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """A whole tensor on the CPU. All processes must call this for a sharded tensor."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu()


def norm_of(parameters: list[torch.nn.Parameter]) -> Tensor:
    """Norm of all gradients together, over all processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The part of a whole tensor that belongs to the process's part of ``parameter``."""
    if not hasattr(parameter, "device_mesh"):
        return tensor.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
