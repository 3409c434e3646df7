"""Attention put together from pieces: dense attentions of some queries over some keys, merged exactly by their log-sums.

Shapes: B sequences, G groups of heads (one key and value head each), R query heads in a group, n queries, k keys, D numbers a
head. Queries and outputs are [B, G, n, R, D], keys and values [B, G, k, D], log-sums [B, G, n, R] in float32 or float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# ---- attention: copied into the modelling file of compact checkpoints ----


@dataclass(frozen=True)
class Piece:
    """One dense attention. A view is a function of a tensor with tokens on axis 2; it gives [B, G, …, m, …] of the same memory.

    ``queries``: view of the queries and of what belongs to them. ``keys``: views of keys and values, joined in this order.
    ``mask``: None, ``causal`` (as many queries as keys), ``reversed`` (a query sees its own key and all later ones), or numbers
    added to the scores, [m, keys] or [B, m, keys]. ``adds``: whether an earlier piece holds some of the same queries.
    """

    queries: Callable[[torch.Tensor], torch.Tensor]
    keys: tuple[Callable[[torch.Tensor], torch.Tensor], ...]
    mask: torch.Tensor | str | None = None
    adds: bool = False


def span(start: int, end: int, step: int = 1) -> Callable[[torch.Tensor], torch.Tensor]:
    """View of every ``step``-th token, ``start`` first and all before ``end``."""
    return lambda x: x[:, :, start:end:step]


def stretches(
    start: int, count: int, length: int, skip: int = 0, drop: int = 0
) -> Callable[[torch.Tensor], torch.Tensor]:
    """View [B, G, count, m, …] of stretches of ``length`` tokens, without the first ``skip`` and the last ``drop`` of each."""
    stop, end = start + count * length, length - drop
    return lambda x: torch.unflatten(x[:, :, start:stop], 2, (count, length))[:, :, :, skip:end]


def columns(start: int, rows: int, length: int, width: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """View [B, G, width, rows, …]: in column c the token ``start`` + c, and every ``length``-th after it."""
    stop = start + rows * length
    return lambda x: torch.unflatten(x[:, :, start:stop], 2, (rows, length))[:, :, :, :width].transpose(2, 3)


def singles(start: int, end: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """View [B, G, end - start, 1, …] of tokens one by one."""
    return lambda x: x[:, :, start:end, None]


def merged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pieces: list[Piece],
    scale: float,
    logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Output [B, G, n, R, Dv] of the pieces under one softmax, with gradients. Each query is in one piece that does not add.

    ``logits``: [G, R], logits in the softmax's denominator that stand for no value.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, logits)):
        result: torch.Tensor = _Merged.apply(query, key, value, logits, pieces, scale)  # type: ignore[no-untyped-call]
        return result
    return _forward(query, key, value, pieces, scale, logits)[0]


class _Merged(torch.autograd.Function):
    """`merged` with gradients. A piece's follow from the whole's output and log-sums, as in ring attention (2310.01889)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        logits: torch.Tensor | None,
        pieces: list[Piece],
        scale: float,
    ) -> torch.Tensor:
        out, sums = _forward(query, key, value, pieces, scale, logits)
        ctx.save_for_backward(query, key, value, logits, out, sums)
        ctx.pieces, ctx.scale = pieces, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, logits, out, sums = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        grads = [torch.zeros_like(x, dtype=wide) for x in (query, key, value)]
        for piece in ctx.pieces:
            mine = [_batched(piece.queries(x), x.ndim - 3) for x in (query, out, sums, grad)]
            keys, values = (joined(piece, x).flatten(0, -3) for x in (key, value))
            parts = _kernel_backward(mine, keys, values, _mask(piece, query), ctx.scale)
            _add(piece.queries(grads[0]), parts[0].transpose(1, 2))
            for total, part in zip(grads[1:], parts[1:], strict=True):
                start = 0
                for view in piece.keys:
                    place = view(total)
                    end = start + place.shape[-2]
                    _add(place, part[:, start:end])
                    start = end
        tops = None
        if logits is not None:  # their value is zero, so d(logit) = -p · (grad · out)
            share = (logits.to(wide)[:, None] - sums).exp()
            tops = -(share * (grad.to(wide) * out.to(wide)).sum(-1)).sum((0, 2)).to(logits.dtype)
        return *(g.to(x.dtype) for g, x in zip(grads, (query, key, value), strict=True)), tops, None, None


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pieces: list[Piece],
    scale: float,
    logits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sums; the output's memory is [B, n, G, R, Dv], as transformers wants it."""
    (batch, groups, tokens, heads), wide = query.shape[:4], torch.promote_types(query.dtype, torch.float32)
    dtype = wide if any(piece.adds for piece in pieces) else query.dtype
    out = query.new_empty((batch, tokens, groups, heads, value.shape[-1]), dtype=dtype).transpose(1, 2)
    sums = query.new_empty((batch, tokens, groups, heads), dtype=wide).transpose(1, 2)
    for piece in pieces:
        mine = _batched(piece.queries(query), 2)
        keys, values = (joined(piece, x).flatten(0, -3) for x in (key, value))
        part, part_sums = _kernel(mine, keys, values, _mask(piece, query), scale)
        place, place_sums = piece.queries(out), piece.queries(sums)
        part = part.transpose(1, 2).reshape(place.shape)
        part_sums = part_sums.transpose(1, 2).reshape(place_sums.shape)
        if piece.adds:
            both = torch.logaddexp(place_sums, part_sums)
            place.lerp_(part.to(dtype), (part_sums - both).exp()[..., None])
            place_sums.copy_(both)
        else:
            place.copy_(part)
            place_sums.copy_(part_sums)
    if logits is not None:
        tops = logits.to(wide)[:, None]
        out.mul_(torch.sigmoid(sums - tops)[..., None].to(dtype))
        sums = torch.logaddexp(sums, tops)
    return out.to(query.dtype), sums


def _batched(x: torch.Tensor, rest: int) -> torch.Tensor:
    """[B, G, …, m, R, …] ▶ [N, R, m, …]; ``rest``: how many axes follow m. A view where the batch has one sequence."""
    x = x.transpose(-rest, -rest - 1)
    return x.flatten(0, x.ndim - rest - 2) if x.ndim > rest + 2 else x


def joined(piece: Piece, x: torch.Tensor) -> torch.Tensor:
    """Keys or values of a piece, [B, G, …, keys, D]."""
    views = [view(x) for view in piece.keys]
    return views[0] if len(views) == 1 else torch.cat(views, -2)


def _mask(piece: Piece, query: torch.Tensor) -> torch.Tensor | str | None:
    """A piece's mask as `_kernel` takes it: of numbers [m, keys] or [N, 1, m, keys]."""
    if isinstance(piece.mask, torch.Tensor) and piece.mask.ndim == 3:
        return piece.mask[:, None].expand(-1, query.shape[1], -1, -1).flatten(0, 1)[:, None]
    return piece.mask


def _add(place: torch.Tensor, part: torch.Tensor) -> None:
    """Add gradients [N, m, …] of a piece to their place [B, G, …, m, …]."""
    place.add_(part.reshape(place.shape))


def _kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | str | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [N, R, m, D] over [N, keys, D]: output [N, R, m, Dv] and log-sums [N, R, m]."""
    if mask == "reversed":
        out, sums = _kernel(query.flip(2), key.flip(1), value.flip(1), "causal", scale)
        return out.flip(2), sums.flip(2)
    numbers, causal = (mask if isinstance(mask, torch.Tensor) else None), mask == "causal"
    kernel = _fused(query, value, numbers)
    if kernel is None:
        scores = _scores(query, key, numbers, causal, scale)
        sums = scores.logsumexp(-1)
        return ((scores - sums[..., None]).exp().to(value.dtype) @ value[:, None]), sums
    heads = (-1, query.shape[1], -1, -1)
    key, value = key[:, None].expand(heads), value[:, None].expand(heads)
    result: tuple[torch.Tensor, ...]
    if kernel == "cpu":
        result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=numbers, scale=scale
        )
    else:
        result = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
    return result[0], result[1]


def _kernel_backward(
    mine: list[torch.Tensor],
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | str | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a piece for queries [N, R, m, D], keys and values [N, keys, D].

    ``mine``: the piece's queries, and there the whole's output, log-sums and gradient.
    """
    if mask == "reversed":
        turned = [x.flip(2) for x in mine]
        back = _kernel_backward(turned, key.flip(1), value.flip(1), "causal", scale)
        return back[0].flip(2), back[1].flip(1), back[2].flip(1)
    query, out, sums, grad = mine
    numbers, causal = (mask if isinstance(mask, torch.Tensor) else None), mask == "causal"
    if _fused(query, value, numbers) == "cpu":
        heads = (-1, query.shape[1], -1, -1)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(
                x.contiguous()
                for x in (grad.to(query.dtype), query, key[:, None].expand(heads), value[:, None].expand(heads))
            ),
            out.to(query.dtype).contiguous(),
            sums.contiguous(),
            0.0,
            causal,
            attn_mask=numbers,
            scale=scale,
        )
        return dq, dk.sum(1), dv.sum(1)
    share = (_scores(query, key, numbers, causal, scale) - sums[..., None]).exp()
    grad, out = grad.to(share.dtype), out.to(share.dtype)
    inner = share * (grad @ value[:, None].to(share.dtype).mT - (grad * out).sum(-1, keepdim=True)) * scale
    dq = inner @ key[:, None].to(share.dtype)
    return dq, (inner.mT @ query.to(share.dtype)).sum(1), (share.mT @ grad).sum(1)


def _scores(
    query: torch.Tensor, key: torch.Tensor, numbers: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    """Masked scores [N, R, m, keys], float32 at least."""
    scores = (query @ key[:, None].mT).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(hidden, -torch.inf)
    return scores if numbers is None else scores + numbers


def _fused(query: torch.Tensor, value: torch.Tensor, numbers: torch.Tensor | None) -> str | None:
    """Which fused kernel serves: ``cpu``, ``cuda``, or None for plain products."""
    if query.shape[-1] != value.shape[-1] or query.shape[2] == 0:
        return None
    if query.device.type == "cpu":
        return "cpu"
    narrow = query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16)
    if not narrow or numbers is not None or query.shape[-1] % 8 or query.shape[-1] > 256:
        return None
    allowed: bool = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    return "cuda" if allowed and torch.cuda.get_device_capability(query.device) >= (8, 0) else None
