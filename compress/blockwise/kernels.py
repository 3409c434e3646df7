"""Convolutions as linear layers: a kernel is the matrix [O, I] of the patches that it reads, I = inputs x positions.

So a convolution's Hessian is that of its unfolded input, as in the code of GPTQ (arXiv 2210.17323) and SparseGPT (arXiv
2301.00774).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

#: Classes whose kernels are linear in patches of their input.
_CLASSES = (torch.nn.Conv1d, torch.nn.Conv2d)


def is_kernel(module: torch.nn.Module) -> bool:
    """Whether a module computes what torch's own convolution of one group does: no class that changes kernel or input first."""
    return any(
        isinstance(module, cls)
        and module.groups == 1
        and type(module).forward is cls.forward
        and type(module)._conv_forward is cls._conv_forward
        for cls in _CLASSES
    )


def geometry(module: torch.nn.Module) -> tuple[Any, ...]:
    """Equal for convolutions that read the same patches of the same input."""
    conv: Any = module
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode


def patches(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The patches [T, I] of an input [N, inputs, *positions], those of one sample after those of another.

    With the kernel as a matrix [O, I], ``patches @ kernel.T`` are the outputs, without bias, of these T patches.
    """
    conv: Any = module
    x = x if x.ndim == len(conv.kernel_size) + 2 else x[None]
    before_and_after = [side for axis in range(len(conv.kernel_size))[::-1] for side in _padding(conv, axis)]
    if any(before_and_after):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = functional.pad(x, before_and_after, mode=mode)
    sizes: list[tuple[int, ...]] = [conv.kernel_size, conv.dilation, conv.stride]
    if x.ndim == 3:  # `unfold` takes images
        x, sizes = x[:, :, None], [(1, *size) for size in sizes]
    kernel, dilation, stride = sizes
    unfolded = functional.unfold(x, kernel, dilation=dilation, stride=stride)
    return unfolded.transpose(1, 2).flatten(0, 1)


def _padding(conv: Any, axis: int) -> tuple[int, int]:
    """Positions that are added before and after an axis."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        whole = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        return whole // 2, whole - whole // 2
    return conv.padding[axis], conv.padding[axis]
