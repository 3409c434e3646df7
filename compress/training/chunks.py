"""Losses over a vocabulary, a few tokens at a time: logits of all tokens never stand in memory together.

As in Liger Kernel (arXiv 2410.10989): the gradient of a chunk is made as soon as its loss is known, so nothing is computed
twice, and memory does not grow with the vocabulary beyond the weights and their gradient. Any function of hidden states will
do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

#: Logits in memory at a time; a few copies of them are.
VALUES = 1 << 22

#: (rows of a chunk) ▶ sums over its tokens, [terms]; the first one is what is minimised.
ChunkLoss = Callable[[torch.Tensor, slice], torch.Tensor]


def chunk_rows(vocabulary: int) -> int:
    """Tokens per chunk."""
    return max(16, VALUES // max(1, vocabulary))


def summed(
    loss: ChunkLoss, hidden: torch.Tensor, parameters: Sequence[torch.Tensor], rows: int, scale: float = 1.0
) -> torch.Tensor:
    """Sums of ``loss`` over all rows of ``hidden`` [N, D], [terms]. Only the first term has a gradient.

    Args:
        parameters: every parameter that ``loss`` uses, besides ``hidden``.
        scale: what gradients are multiplied by while they are narrow floats (of a gradient scaler).
    """
    wanted = [p for p in parameters if p.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or wanted):
        result: torch.Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
            loss, rows, scale, hidden, *wanted
        )
        return result
    parts = [loss(hidden[i : i + rows], slice(i, i + rows)).float() for i in range(0, len(hidden), rows)]
    return torch.stack(parts).sum(0)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: ChunkLoss, rows: int, scale: float, hidden: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        total: torch.Tensor | None = None
        of_hidden = torch.empty_like(hidden)
        of_parameters: list[torch.Tensor | None] = [None] * len(parameters)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            with torch.enable_grad():
                piece = hidden[part].detach().requires_grad_()
                sums = loss(piece, part)
                found = torch.autograd.grad(sums[0] * scale, [piece, *parameters], allow_unused=True)
            total = sums.detach().float() if total is None else total + sums.detach()
            of_hidden[part] = 0 if found[0] is None else found[0]
            for i, gradient in enumerate(found[1:]):
                if gradient is not None:
                    before = of_parameters[i]
                    of_parameters[i] = gradient if before is None else before.add_(gradient)
        assert total is not None
        ctx.save_for_backward(of_hidden, *(g for g in of_parameters if g is not None))
        ctx.used = [g is not None for g in of_parameters]
        ctx.scale = scale
        return total

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[Any, ...]:
        of_hidden, *rest = ctx.saved_tensors
        factor = outer[0] / ctx.scale
        found = iter(rest)
        gradients = [next(found) * factor if used else None for used in ctx.used]
        return (None, None, None, of_hidden * factor, *gradients)
