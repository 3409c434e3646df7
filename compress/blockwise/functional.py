"""Layers whose weights a function computes with, which hooks on the layers do not see.

``torch.nn.functional.multi_head_attention_forward`` takes the weights of its projections, as WavLM's attention hands them over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional


@contextmanager
def projections_as_calls(block: torch.nn.Module) -> Iterator[None]:
    """Within, a projection that functional attention computes counts as a call of the layer that holds its weight.

    The layer's hooks get the inputs and outputs with samples first, [samples, length, …].
    """
    whole: Callable[..., Any] = functional.multi_head_attention_forward
    linear: Callable[..., Any] = functional.linear
    owners = {id(m.weight): m for m in block.modules() if isinstance(m, torch.nn.Linear)}

    def attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        length, samples = query.shape[:2] if query.ndim == 3 else (len(query), 1)

        def samples_first(x: torch.Tensor) -> torch.Tensor:
            if x.ndim == 2 and len(x) == length * samples:
                x = x.view(length, samples, -1)
            return x.transpose(0, 1) if x.ndim == 3 else x

        def projection(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            owner = owners.get(id(weight))
            for hook in () if owner is None else tuple(owner._forward_pre_hooks.values()):
                hook(owner, (samples_first(x),))
            output: torch.Tensor = linear(x, weight, bias)
            for after in () if owner is None else tuple(owner._forward_hooks.values()):
                after(owner, (samples_first(x),), samples_first(output))
            return output

        functional.linear = projection  # type: ignore[assignment]
        try:
            return whole(query, *args, **kwargs)
        finally:
            functional.linear = linear

    functional.multi_head_attention_forward = attention
    try:
        yield
    finally:
        functional.multi_head_attention_forward = whole
