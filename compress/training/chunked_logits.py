"""Losses over a vocabulary, a few tokens at a time, so that the logits of all tokens are never in memory together.

As in Liger Kernel (arXiv 2410.10989), the gradient of a chunk is computed right after its loss. Nothing is computed twice,
and beyond the weights and their gradient memory does not grow with the vocabulary.

N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Logits in memory at a time, by kind of device; a few copies of them are.
VALUES = {"cpu": 1 << 22, "cuda": 1 << 26}
#: Fewest tokens of a chunk.
_LEAST = 16

#: Logits [n, V] of the rows of a chunk ▶ sums over its tokens, [terms]; the first one is what is minimised.
ChunkLoss = Callable[[Tensor, slice], Tensor]
#: Hidden states [n, D] ▶ logits [n, V].
Head = Callable[[Tensor], Tensor]


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens per chunk."""
    return max(_LEAST, VALUES[device.type] // max(1, vocabulary))


def summed(
    loss: ChunkLoss,
    head: Head,
    hidden: Tensor,
    parameters: Sequence[Tensor],
    rows: int,
    *,
    factor: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """Sums of ``loss`` over all rows of ``hidden`` [N, D], times ``factor``, [terms]. Only the first term has a gradient.

    Args:
        head: a `torch.nn.Linear` takes less memory than another function.
        parameters: all parameters that ``head`` uses.
        scale: factor of the gradients while they are narrow floats, as of a gradient scaler.
    """
    wanted = [p for p in parameters if p.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or wanted):
        result: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
            loss, head, rows, factor, scale, hidden, *wanted
        )
        return result
    parts = [loss(head(hidden[i : i + rows]), slice(i, i + rows)).float() for i in range(0, len(hidden), rows)]
    return torch.stack(parts).sum(0) * factor


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: ChunkLoss,
        head: Head,
        rows: int,
        factor: float,
        scale: float,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        backward = _through_linear if isinstance(head, torch.nn.Linear) else _through_any
        total: Tensor | None = None
        of_hidden = torch.empty_like(hidden)
        of_parameters: list[Tensor | None] = [None] * len(parameters)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)

            def share(logits: Tensor, part: slice = part) -> Tensor:
                return loss(logits, part) * factor

            piece = hidden[part].detach()
            sums, of_hidden[part] = backward(share, head, piece, parameters, of_parameters, scale)
            total = sums if total is None else total + sums
        assert total is not None
        ctx.save_for_backward(of_hidden, *(g for g in of_parameters if g is not None))
        ctx.used = [g is not None for g in of_parameters]
        ctx.scale = scale
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Any, ...]:
        # in place, as another copy of the head's gradient would be as large as the head
        of_hidden, *rest = (gradient.mul_(outer[0] / ctx.scale) for gradient in ctx.saved_tensors)
        gradients = iter(rest)
        return (None, None, None, None, None, of_hidden, *(next(gradients) if used else None for used in ctx.used))


def _through_any(
    loss: Callable[[Tensor], Tensor],
    head: Head,
    hidden: Tensor,
    parameters: Sequence[Tensor],
    gradients: list[Tensor | None],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Sums, and the gradient of ``hidden``. Gradients of the parameters are added to ``gradients``."""
    with torch.enable_grad():
        hidden = hidden.requires_grad_()
        sums = loss(head(hidden))
        derivatives = torch.autograd.grad(sums[0] * scale, [hidden, *parameters], allow_unused=True)
    for i, gradient in enumerate(derivatives[1:]):
        if gradient is not None:
            before = gradients[i]
            gradients[i] = gradient if before is None else before.add_(gradient)
    return sums.detach().float(), derivatives[0] if derivatives[0] is not None else torch.zeros_like(hidden)


def _through_linear(
    loss: Callable[[Tensor], Tensor],
    head: Any,
    hidden: Tensor,
    parameters: Sequence[Tensor],
    gradients: list[Tensor | None],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `_through_any`, but in float32 no chunk needs a matrix [V, D]: its product is added to the sum directly."""
    logits = head(hidden).detach().requires_grad_()
    with torch.enable_grad():
        sums = loss(logits)
        (of_logits,) = torch.autograd.grad(sums[0] * scale, [logits])
    for i, parameter in enumerate(parameters):
        if gradients[i] is None:
            gradients[i] = torch.zeros_like(parameter)
        into = gradients[i]
        assert into is not None
        if parameter is not head.weight:
            into += of_logits.sum(0)
        elif of_logits.dtype == into.dtype:
            into.addmm_(of_logits.T, hidden.to(into.dtype))
        else:
            into += of_logits.T @ hidden.to(of_logits.dtype)
    return sums.detach().float(), (of_logits @ head.weight.to(of_logits.dtype)).to(hidden.dtype)
