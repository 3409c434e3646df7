"""Slow twin of the attention over a part of the tokens: every pair one by one, in float64."""

from __future__ import annotations

import functools

import torch

from compress.checkpoint.attention.patterns import LocalPattern


def sees(pattern: LocalPattern, i: int, j: int) -> bool:
    """Whether the token at position i sees the one at j, by the definitions of the papers."""
    if j > i:
        return False
    if j < pattern.sinks:
        return True
    if pattern.stride is not None and (i - j) % pattern.stride == 0:
        return True
    period = pattern.period or pattern.block
    if pattern.last and j % period in range(period - pattern.last, period):
        return True
    if pattern.block is not None:
        return i // pattern.block == j // pattern.block
    return pattern.window is None or j > i - pattern.window


@functools.cache
def _seen(pattern: LocalPattern, tokens: int, positions: tuple[int, ...]) -> torch.Tensor:
    """Which of these positions each of the last ``tokens`` of them sees."""
    return torch.tensor([[sees(pattern, i, j) for j in positions] for i in positions[len(positions) - tokens :]])


def dense_attention(query, key, value, pattern, *, scale=None, logits=None, padding=None, positions=None):
    """[B, H, q, Dv] in float64."""
    query, key, value = query.double(), key.double(), value.double()
    (batch, heads, tokens, size), known = query.shape, key.shape[2]
    key, value = (x.repeat_interleave(heads // key.shape[1], 1) for x in (key, value))
    where = range(known) if positions is None else positions.tolist()
    begins = [0] * batch if padding is None else padding.int().argmax(1).tolist()
    seen = torch.stack([_seen(pattern, tokens, tuple(j - begin for j in where)) for begin in begins])
    if padding is not None:
        seen = seen & padding.bool()[:, None]
    scores = (query @ key.mT) * (size**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if logits is not None:
        tops = logits.double()[None, :, None, None].expand(batch, -1, tokens, 1)
        return torch.cat([scores, tops], -1).softmax(-1)[..., :-1] @ value
    return scores.softmax(-1).nan_to_num(0) @ value
