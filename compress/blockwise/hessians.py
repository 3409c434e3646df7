"""H = Σ x xᵀ of the inputs of matrices, summed in forward hooks.

T tokens, I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.blockwise.experts import ExpertSwap
from compress.blockwise.linears import TargetLinear
from compress.blockwise.memory_budget import FLOAT64_MAX_WIDTH
from compress.blockwise.routed import counted_rows
from compress.blockwise.streamed import StopForward

#: Rows of a symmetric sum that are added at a time, from the diagonal on: up to that width, and above it. Measured on CPU:
#: 128 take nine tenths of 256's time at a width of 768, and 1.3 of it at 2048.
_STRIP, _WIDE, _WIDE_STRIP = 128, 768, 256
#: Tokens that float64 sums wait for: the float32 products in between are exact enough, and adding them takes time.
_TOKENS_PER_SUM = 4096
#: Width from which on products with AMX take a third of the time.
_TILES_PAY = 256


@dataclass
class InputStatistics:
    """Sums over calibration tokens of a group's inputs: H = Σ x xᵀ [I, I], Σ x [I], and the number of tokens.

    While inputs are added they wait until there are ``batch`` tokens, and only the upper part of H is summed; `finish`
    completes it.
    """

    hessian: torch.Tensor
    total: torch.Tensor = field(init=False)
    tokens: int = 0
    batch: int = 0
    _waiting: list[torch.Tensor] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        self.total = torch.zeros(len(self.hessian), dtype=torch.float64, device=self.hessian.device)

    def add(self, x: torch.Tensor) -> None:
        """Add inputs [T, I]; there may be none."""
        if not len(x):
            return
        self._waiting.append(x.float())
        self._count += len(x)
        self.tokens += len(x)
        if self._count >= self.batch:
            self._sum()

    def _sum(self) -> None:
        x = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting.clear()
        self._count = 0
        self.total += x.sum(0)
        with tensor_cores(x):
            for start, stop in _strips(x.shape[1]):
                into = self.hessian[start:stop, start:]
                if into.dtype == torch.float32:
                    into.addmm_(x[:, start:stop].T, x[:, start:])
                else:
                    into += x[:, start:stop].T @ x[:, start:]

    def finish(self) -> None:
        """Add the inputs that wait, and mirror H below its diagonal strips."""
        if self._waiting:
            self._sum()
        for start, stop in _strips(len(self.hessian)):
            self.hessian[stop:, start:stop] = self.hessian[start:stop, stop:].T

    def centred(self) -> torch.Tensor:
        """Σ (x - mean)(x - mean)ᵀ, in H's dtype."""
        total = self.total.to(self.hessian.dtype)
        return self.hessian.clone().addr_(total, total, alpha=-1 / max(1, self.tokens))

    def relative_error(self, before: torch.Tensor, after: torch.Tensor, centred: bool = False) -> float | None:
        """||(W - W')X||² over ||WX||², for weights [O, I]; None where no token was seen.

        Args:
            centred: a bias compensates for the mean of the difference.
        """
        if self.tokens == 0:
            return None
        error, scale = self.energies(before, after, centred)
        return error / scale if scale else 0.0

    def error_row(self, before: torch.Tensor, after: torch.Tensor, portion: bool) -> dict[str, Any]:
        """Entries of a report's row: ``error`` (`relative_error`), and of a portion of a matrix ``energy``, ||WX||²."""
        if self.tokens == 0:
            return {"error": None}
        error, scale = self.energies(before, after)
        row = {"error": error / scale if scale else 0.0}
        return row | {"energy": scale} if portion else row

    def energies(self, before: torch.Tensor, after: torch.Tensor, centred: bool = False) -> tuple[float, float]:
        """||(W - W')X||² and ||WX||², for weights [O, I]; ``centred`` as in `relative_error`."""
        hessian = self.hessian.float()
        lost = self.centred().float() if centred else hessian
        error = scale = 0.0
        for start in range(0, len(before), 512):  # a few rows at a time: matrices may be large
            weight = before[start : start + 512].float()
            error += _energy(weight - after[start : start + 512], lost)
            scale += _energy(weight, hessian)
        return error, scale


def _energy(rows: torch.Tensor, hessian: torch.Tensor) -> float:
    """Σ v H vᵀ over rows v, of a symmetric H; what lies below its diagonal strips is what lies right of them."""
    total = 0.0
    for start, stop in _strips(len(hessian)):
        own, product = rows[:, start:], rows[:, start:stop] @ hessian[start:stop, start:]
        product[:, stop - start :] *= 2
        total += float(product.mul_(own).sum())
    return total


def _strips(width: int) -> list[tuple[int, int]]:
    step = _STRIP if width <= _WIDE else _WIDE_STRIP
    return [(start, min(start + step, width)) for start in range(0, width, step)]


@contextmanager
def tensor_cores(x: torch.Tensor, *, tiles: bool = False) -> Iterator[None]:
    """Within, products of float32 matrices round ``x`` where that is faster; sums are float32.

    On a GPU to TF32. It has 10 bits of mantissa: bfloat16 values are exact in it, and what it adds to statistics of float32
    values is far below their damping.

    Args:
        tiles: to bfloat16 on a CPU with AMX, from widths on at which that pays.
    """
    cpu = x.device.type == "cpu"
    if cpu and not (tiles and x.shape[-1] >= _TILES_PAY and getattr(torch.cpu, "_is_amx_tile_supported", bool)()):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if cpu else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def hessian_dtype(width: int) -> torch.dtype:
    """Dtype that the Hessian of ``width`` inputs is summed in."""
    return torch.float64 if width <= FLOAT64_MAX_WIDTH else torch.float32


def hessian_bytes(group: Sequence[TargetLinear]) -> int:
    """Bytes of a group's Hessian."""
    width = int(group[0].weight.shape[1])
    return width * width * hessian_dtype(width).itemsize


def empty_statistics(group: Sequence[TargetLinear], device: str) -> InputStatistics:
    """Statistics of a group before any tokens."""
    width = group[0].weight.shape[1]
    hessian = torch.zeros(width, width, dtype=hessian_dtype(width), device=device)
    # of many experts each would hold its own waiting inputs
    waits = hessian.dtype == torch.float64 and group[0].owner is None
    return InputStatistics(hessian, batch=_TOKENS_PER_SUM if waits else 0)


def counted(x: torch.Tensor, masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of x [T, …] that count: by the mask of as many tokens, [samples, length] or flat; all where none has."""
    mask = next((mask for mask in masks if mask.numel() == len(x)), None)
    return x if mask is None else x[mask.flatten()]


@contextmanager
def collect_hessians(
    groups: Sequence[Sequence[TargetLinear]], device: str, last: int | None = None
) -> Iterator[list[InputStatistics]]:
    """Within, every forward pass of the block adds to the statistics of the groups; `set_token_mask` says which tokens count.

    With ``last``, the number of the group that reads last, a pass ends by `StopForward` once that group has its inputs.
    """
    statistics = []
    handles = []
    for number, group in enumerate(groups):
        sums = empty_statistics(group, device)
        statistics.append(sums)
        handles.append(group[0].module.register_forward_pre_hook(_adder(group[0], sums, number == last)))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
    for sums in statistics:
        sums.finish()


def _adder(linear: TargetLinear, sums: InputStatistics, last: bool) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...]) -> None:
        x = linear.rows(args[0].detach())
        if linear.routed:
            x = counted_rows(x)
        elif linear.owner is None:
            x = counted(x, getattr(module, "token_masks", ()))
        elif linear.owner.expert_mask is not None:
            x = x[linear.owner.expert_mask]
        sums.add(x)
        if last:
            raise StopForward

    return hook


def set_token_masks(
    groups: Sequence[Sequence[TargetLinear]], swaps: Sequence[ExpertSwap], masks: Sequence[torch.Tensor]
) -> None:
    """Set which tokens count in the next forward pass: bool [samples, length], of the block first; none where all count."""
    for group in groups:
        module: Any = group[0].module
        module.token_masks = masks
    for swap in swaps:
        swap.experts.token_mask = masks[0].flatten() if masks else None
