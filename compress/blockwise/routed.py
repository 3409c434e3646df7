"""Experts that are modules of a list which is called itself: which of the rows that an expert reads are padding.

The list's own code picks an expert's rows, so their places are not known. The rows of padding are NaN while the list runs, and
so are those that an expert reads of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def routing_lists(block: Any) -> dict[str, Any]:
    """Lists of modules within a block that choose what each of their modules reads, by path."""
    kinds = (torch.nn.ModuleList, torch.nn.ModuleDict)
    return {
        path: module
        for path, module in block.named_modules()
        if isinstance(module, kinds) and type(module).forward is not torch.nn.Module.forward
    }


def counted_rows(x: torch.Tensor) -> torch.Tensor:
    """The rows of x [T, I] that an expert read within `marked` and that count."""
    return x[~x.isnan().all(-1)]


@contextmanager
def marked(lists: Sequence[Any], masks: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within, these lists read NaN in place of padding, by the mask of as many tokens; what they return of it is zero."""
    masking: list[torch.Tensor] = []

    def mark(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        masking.clear()
        for place, x in enumerate(args):
            mask = _mask_of(x, masks)
            if mask is not None:
                masking.append(mask)
                return (*args[:place], x.masked_fill(~mask, float("nan")), *args[place + 1 :]), kwargs
        for name, x in kwargs.items():
            mask = _mask_of(x, masks)
            if mask is not None:
                masking.append(mask)
                return args, {**kwargs, name: x.masked_fill(~mask, float("nan"))}
        return None

    def clear(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill(~masking[0], 0.0) if masking else output

    handles = [module.register_forward_pre_hook(mark, with_kwargs=True) for module in lists if masks]
    handles += [module.register_forward_hook(clear) for module in lists if masks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mask_of(x: Any, masks: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The mask, [*x.shape[:-1], 1], of hidden states; None where x is something else."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim < 2:
        return None
    mask = next((mask for mask in masks if mask.numel() == x.shape[:-1].numel()), None)
    return None if mask is None else mask.reshape(*x.shape[:-1], 1)
